"""A whole model on the Triton kernels (without a GPU: interpreted) against the same model on the references."""

import torch

from mdm_kernels import use_backend
from mdm_models import UNetConfig, build_model
from mdm_models.diffusion import MatryoshkaDiffusion

CONFIG = UNetConfig(
    channels=(32, 32),
    blocks=(1, 1),
    kind="time",
    temporal_attention=(1, 0),
    embed_dim=32,
    norm_groups=8,
    inner=UNetConfig(
        channels=(32,),
        blocks=(1,),
        attention=(1,),
        num_heads=2,
        embed_dim=32,
        norm_groups=8,
        context_dim=16,
    ),
)


def loss_and_gradients(model, diffusion, backend: str):
    images = torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    time = torch.tensor([100, 600])
    model.zero_grad()
    with use_backend(backend):
        x_t = diffusion.add_noise(images, time, model.config.strides, seed=7)
        preds = model(x_t, time, context, mask)
        loss = diffusion.per_sample_loss(preds, images, time, seed=7)
        loss.mean().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_training_step_on_triton_equals_one_on_the_references():
    model = build_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    diffusion = MatryoshkaDiffusion(CONFIG.scales)
    loss, gradients = loss_and_gradients(model, diffusion, "triton")
    expected_loss, expected = loss_and_gradients(model, diffusion, "torch")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-3 * largest)
        assert error < 1e-3, f"{name}: {error}"  # float32 through some 30 layers
