"""A seed in a tensor: the noise of the same integer, bit for bit, read by the kernel when it runs."""

import pytest
import torch

from mdm_kernels import backend, multires_loss, multires_noise

SEEDS = [7, 2**32 + 2**31, 2**63 - 1]
ALPHA_BARS = torch.tensor([[0.3, 0.8], [0.6, 0.9]])
on_both_backends = pytest.mark.parametrize("name", ["triton", "torch"])


def noise_and_loss(seed) -> list[torch.Tensor]:
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    x_t = multires_noise(images, ALPHA_BARS, [1, 4], seed=seed)
    preds = [x.requires_grad_() for x in x_t]
    loss = multires_loss(preds, images, ALPHA_BARS, [1, 4], seed=seed)
    return [*x_t, loss, *torch.autograd.grad(loss.sum(), preds)]


@on_both_backends
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_seed_draws_the_noise_of_its_integer(name, shape):
    with backend.use_backend(name):
        for seed in SEEDS:
            in_tensor, in_int = noise_and_loss(torch.full(shape, seed)), noise_and_loss(seed)
            assert all(torch.equal(a, b) for a, b in zip(in_tensor, in_int, strict=True)), seed


@on_both_backends
def test_a_negative_tensor_seed_is_2_to_the_64_more(name):
    """Its value cannot be refused, since looking at it would stall a GPU; it is as good a key as any."""
    with backend.use_backend(name):
        first, second, positive = (noise_and_loss(torch.tensor([seed])) for seed in (-1, -1, 2**63 - 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], positive[0])


def test_both_backends_draw_the_same_noise_from_a_negative_tensor_seed():
    seed = torch.tensor([-(2**40) - 3])
    with backend.use_backend("triton"):
        from_kernel = noise_and_loss(seed)
    torch.testing.assert_close(from_kernel, noise_and_loss(seed), rtol=1e-4, atol=1e-5)


@on_both_backends
def test_a_compiled_call_reads_the_seed_when_it_runs(name):
    def noise(seed) -> torch.Tensor:
        return multires_noise(torch.ones(2, 3, 8, 8), ALPHA_BARS, [1, 4], seed=seed)[0]

    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
    seed = torch.tensor([3])
    with backend.use_backend(name):
        for _ in range(2):
            assert torch.equal(compiled(seed), noise(int(seed)))
            seed.add_(1)


def test_the_seed_is_left_alone():
    seed = torch.tensor([5])
    with backend.use_backend("triton"):
        noise_and_loss(seed)
    assert seed == 5


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.tensor([1.0]), TypeError, "seed is a tensor of torch.float32; it must be an int or a tensor"),
        (torch.tensor([1], dtype=torch.int32), TypeError, "seed is a tensor of torch.int32"),
        (torch.tensor([1, 2]), ValueError, r"seed has shape \(2,\); it must hold one element"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"seed has shape \(0,\)"),
        (torch.tensor([1], device="meta"), ValueError, "seed is on meta and images on "),
        (True, TypeError, "seed is bool; it must be an int, or a tensor of one int64"),
        (-1, ValueError, "seed is -1; it must be at least 0 and below 2⁶³"),
        (2**63, ValueError, "seed is 9223372036854775808"),
    ],
)
def test_a_bad_seed_is_named(seed, error, message):
    with pytest.raises(error, match=message):
        multires_noise(torch.zeros(2, 3, 8, 8), ALPHA_BARS, [1, 4], seed=seed)
    with pytest.raises(error, match=message):
        multires_loss([torch.zeros(2, 3, 8, 8)] * 2, torch.zeros(2, 3, 8, 8), ALPHA_BARS, [1, 1], seed=seed)
