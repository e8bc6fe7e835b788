"""Noising and loss, against numbers of the official code and against their definitions."""

import itertools

import pytest
import torch
from torch import Tensor

from mdm_kernels import backend
from mdm_models.diffusion import MatryoshkaDiffusion, continuous_times, discrete_times, logit_normal_times
from tests.diffusion.test_diffusion import assert_golden, levels, process
from tests.models import golden


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(("file", "strides", "weights"), [("256", [1, 4], None), ("1024", [1, 4, 16], [16, 4, 1])])
def test_noising_and_loss_match_the_official_ones(file, strides, weights, name):
    metadata, tensors = golden.read(f"loss_{file}")
    diffusion = process(metadata, weights)
    images, time = tensors["in.images"], tensors["in.time"]
    noise, preds = levels(tensors, "in.eps"), levels(tensors, "in.pred")
    with backend.use_backend(name):
        x_t = diffusion.add_noise(images, time, strides, noise)
        loss = diffusion.per_sample_loss(preds, images, time, noise)
    for level, expected in enumerate(levels(tensors, "out.x_t")):
        assert_golden(diffusion.alpha_bar(time + 1, level), tensors[f"out.gamma{level}"])
        assert_golden(x_t[level], expected)
    assert_golden(loss, tensors["out.loss_per_sample"])


def test_loss_of_a_clip_takes_its_strides_from_the_shapes():
    diffusion = MatryoshkaDiffusion((16, 4, 1))
    clip, time = torch.randn(2, 3, 4, 16, 16), torch.tensor([10, 900])
    strides = [(1, 1), (1, 4), (4, 4)]
    noise = [torch.randn_like(x) for x in diffusion.add_noise(clip, time, strides, seed=0)]
    a, s = (torch.stack([coefficient[i] for i in range(2)]) for coefficient in _coefficients(diffusion, time + 1, 2))
    frames = torch.nn.functional.avg_pool3d(clip[:, :, ::4], (1, 4, 4))
    perfect = [torch.zeros_like(noise[0]), torch.zeros_like(noise[1]), a * noise[2] - s * frames]
    loss = diffusion.per_sample_loss(perfect, clip, time, noise)
    without = diffusion.per_sample_loss([*perfect[:2], perfect[2] + 1], clip, time, noise)
    torch.testing.assert_close(without - loss, diffusion.alpha_bar(time + 1, 2), rtol=1e-4, atol=1e-6)


def _coefficients(diffusion: MatryoshkaDiffusion, t: Tensor, level: int) -> tuple[Tensor, Tensor]:
    alpha_bar = diffusion.alpha_bar(t, level).view(-1, 1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_a_mixed_batch_divides_a_levels_loss_by_its_fraction():
    diffusion = MatryoshkaDiffusion((4, 1))
    images, time = torch.randn(3, 3, 8, 8), torch.tensor([5, 500, 950])
    preds = [torch.randn(3, 3, 8, 8), torch.randn(3, 3, 2, 2)]
    high_only = MatryoshkaDiffusion((4, 1), level_weights=(1, 0)).per_sample_loss(preds, images, time, seed=1)
    low_only = MatryoshkaDiffusion((4, 1), level_weights=(0, 1)).per_sample_loss(preds, images, time, seed=1)
    mixed = diffusion.per_sample_loss([preds[0][:2], preds[1]], images, time, seed=1)
    torch.testing.assert_close(mixed, low_only + high_only * torch.tensor([1.5, 1.5, 0]))


def test_loss_takes_the_noise_of_the_same_seed():
    diffusion = MatryoshkaDiffusion((4, 1), prediction="eps")
    images, time = torch.randn(2, 3, 8, 8), torch.tensor([300, 700])
    x_t = diffusion.add_noise(images, time, [1, 4], seed=3)
    alpha_bar = diffusion.alpha_bar(time + 1, 0).view(2, 1, 1, 1)
    eps = (x_t[0] - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()
    preds = [eps, torch.zeros(2, 3, 2, 2)]
    low_only = MatryoshkaDiffusion((4, 1), prediction="eps", level_weights=(0, 1))
    expected = low_only.per_sample_loss(preds, images, time, seed=3)
    torch.testing.assert_close(diffusion.per_sample_loss(preds, images, time, seed=3), expected)


def test_noising_and_loss_compile_in_one_graph_for_any_batch_size():
    diffusion = MatryoshkaDiffusion((4, 1))

    def loss(preds, images, time):
        x_t = diffusion.add_noise(images, time, [1, 4], seed=5)
        return diffusion.per_sample_loss([*preds, x_t[1]], images, time, seed=5)

    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    for batch, stance in ((6, "default"), (7, "fail_on_recompile")):
        images, time = torch.randn(batch, 3, 8, 8), torch.randint(1000, (batch,))
        preds = [torch.randn(batch - 1, 3, 8, 8)]
        with torch.compiler.set_stance(stance):
            found = compiled(preds, images, time)
        torch.testing.assert_close(found, loss(preds, images, time))


# Every prediction, loss target and time, at two levels


SPACES = list(itertools.product(("v", "eps", "x0"), repeat=2))  # prediction, loss target
TIMES = [discrete_times, continuous_times, logit_normal_times]


class Batch:
    """Images of 8² and 2² in float64, their noise, and what stands in the definition of the loss."""

    def __init__(self, diffusion: MatryoshkaDiffusion, draw_times):
        self.images = torch.rand(3, 2, 8, 8, dtype=torch.float64) * 2 - 1
        self.time = draw_times(torch.tensor([0.1, 0.55, 0.9]), diffusion.num_steps)
        self.noise = [torch.randn(3, 2, size, size, dtype=torch.float64) for size in (8, 2)]
        self.clean = [self.images, torch.nn.functional.avg_pool2d(self.images, 4)]
        self.alpha_bars = [diffusion.alpha_bar(self.time + 1, i).double().view(3, 1, 1, 1) for i in range(2)]

    def means(self, level: int, kind: str, pred: Tensor, predicted: str) -> Tensor:
        """`pred` of kind `predicted` at x_t, as the v, eps or x0 that it means there."""
        a, s = self.alpha_bars[level].sqrt(), (1 - self.alpha_bars[level]).sqrt()
        x_t = a * self.clean[level] + s * self.noise[level]
        image = {"v": a * x_t - s * pred, "eps": (x_t - s * pred) / a, "x0": pred}[predicted]
        eps = (x_t - a * image) / s
        return {"v": a * eps - s * image, "eps": eps, "x0": image}[kind]


@pytest.mark.parametrize(("prediction", "loss_target"), SPACES)
@pytest.mark.parametrize("draw_times", TIMES)
def test_loss_of_an_exact_predictor_is_zero(prediction, loss_target, draw_times):
    diffusion = MatryoshkaDiffusion((4, 1), prediction=prediction, loss_target=loss_target)
    batch = Batch(diffusion, draw_times)
    exact = [batch.means(i, prediction, image, "x0") for i, image in enumerate(batch.clean)]
    loss = diffusion.per_sample_loss(exact, batch.images, batch.time, batch.noise)
    wrong = diffusion.per_sample_loss([pred + 0.1 for pred in exact], batch.images, batch.time, batch.noise)
    assert (loss <= 1e-20 * wrong).all()
    assert (wrong > 0).all()


@pytest.mark.parametrize(("prediction", "loss_target"), SPACES)
@pytest.mark.parametrize("draw_times", TIMES)
def test_loss_and_gradients_are_those_of_the_definition(prediction, loss_target, draw_times):
    """The mean squared difference, in the target's space, between what is predicted and what is true."""
    weights = (2.0, 0.5)
    diffusion = MatryoshkaDiffusion((4, 1), prediction=prediction, loss_target=loss_target, level_weights=weights)
    batch = Batch(diffusion, draw_times)
    preds = [torch.randn_like(x).requires_grad_() for x in batch.clean]
    loss = diffusion.per_sample_loss(preds, batch.images, batch.time, batch.noise)
    expected = sum(
        weight * (batch.means(i, loss_target, preds[i], prediction) - batch.means(i, loss_target, batch.clean[i], "x0"))
        .square().flatten(1).mean(1)
        for i, weight in enumerate(weights)
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    upstream = torch.randn(3, dtype=torch.float64)
    gradients = torch.autograd.grad(loss @ upstream, preds)
    for gradient, definition in zip(gradients, torch.autograd.grad(expected @ upstream, preds), strict=True):
        torch.testing.assert_close(gradient, definition, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("prediction", "loss_target", "factor"),
    [
        ("v", "v", lambda alpha_bar: 1),
        ("v", "eps", lambda alpha_bar: alpha_bar),  # the official objective
        ("v", "x0", lambda alpha_bar: 1 - alpha_bar),
        ("x0", "v", lambda alpha_bar: 1 / (1 - alpha_bar)),
        ("x0", "eps", lambda alpha_bar: alpha_bar / (1 - alpha_bar)),
        ("eps", "v", lambda alpha_bar: 1 / alpha_bar),
        ("eps", "x0", lambda alpha_bar: (1 - alpha_bar) / alpha_bar),
    ],
)
def test_a_change_of_space_weighs_the_error_by_a_factor_of_the_noise(prediction, loss_target, factor):
    diffusion = MatryoshkaDiffusion((4, 1), prediction=prediction, loss_target=loss_target, level_weights=(1, 0))
    plain = MatryoshkaDiffusion((4, 1), prediction=prediction, loss_target=prediction, level_weights=(1, 0))
    batch = Batch(diffusion, continuous_times)
    preds = [torch.randn_like(x) for x in batch.clean]
    loss, unweighted = (d.per_sample_loss(preds, batch.images, batch.time, batch.noise) for d in (diffusion, plain))
    expected = factor(batch.alpha_bars[0].flatten()) * unweighted
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_noise_at_real_times_is_that_of_the_schedule(name):
    diffusion = MatryoshkaDiffusion((4, 1))
    images, time = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([17.25, 800.5])
    noise = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)]
    with backend.use_backend(name):
        x_t = diffusion.add_noise(images, time, [1, 4], noise)
    for row, t in enumerate(time.tolist()):
        at_t = diffusion.schedule.noise_levels(t + 1)[0]
        torch.testing.assert_close(x_t[0][row], at_t.alpha * images[row] + at_t.sigma * noise[0][row])


def test_bad_arguments_are_named():
    diffusion = MatryoshkaDiffusion((4, 1))
    images, time = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    preds = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)]
    cases = [
        (ValueError, "prediction is 'x'", lambda: MatryoshkaDiffusion((1,), prediction="x")),
        (ValueError, "loss_target is 'x'", lambda: MatryoshkaDiffusion((1,), loss_target="x")),
        (ValueError, "level_weights has 1", lambda: MatryoshkaDiffusion((4, 1), level_weights=(1,))),
        (ValueError, "t is in", lambda: diffusion.add_noise(images, torch.tensor([0, 1000]), [1, 4], seed=0)),
        (ValueError, "time has shape", lambda: diffusion.add_noise(images, time[None], [1, 4], seed=0)),
        (ValueError, "preds has 1", lambda: diffusion.per_sample_loss(preds[:1], images, time, seed=0)),
        (ValueError, "divide", lambda: diffusion.per_sample_loss([preds[0], preds[0][..., :3]], images, time, seed=0)),
        (ValueError, "as wide", lambda: diffusion.per_sample_loss([preds[0], preds[0][..., :4]], images, time, seed=0)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
