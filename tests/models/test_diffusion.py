"""The diffusion process against numbers of the official code, and the samplers against distributions known exactly."""

import json

import pytest
import torch
from torch import Tensor

from mdm_kernels import backend
from mdm_models.diffusion import MatryoshkaDiffusion, alpha_bar_table, guide, sample, time_grid
from mdm_models.diffusion.schedule import SCHEDULES, shifted

from . import golden


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert golden.relative_error(actual.double(), expected.double()) <= 1e-5


def levels(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [tensors[f"{prefix}{i}"] for i in range(10) if f"{prefix}{i}" in tensors]


def process(metadata: dict[str, str], level_weights=None) -> MatryoshkaDiffusion:
    scales, power = json.loads(metadata["scales"]), float(metadata["shift_power"])
    return MatryoshkaDiffusion(scales, power, level_weights=level_weights)


# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_match_the_official_ones(schedule):
    expected = golden.read("schedules")[1][f"{schedule}.gammas"]
    torch.testing.assert_close(alpha_bar_table(schedule, 1000).float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [4, 16])
@pytest.mark.parametrize("power", [1, 2])
def test_shifted_schedules_match_the_official_ones(scale, power):
    expected = golden.read("schedules")[1][f"deepfloyd.shift{scale}_p{power}"]
    diffusion = MatryoshkaDiffusion((scale, 1), power)
    torch.testing.assert_close(diffusion.alpha_bar(torch.arange(1001), 0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_schedules_fall_from_one_and_stay_above_zero(schedule, num_steps):
    table = alpha_bar_table(schedule, num_steps)
    assert table.shape == (num_steps + 1,)
    assert table[0] == 1
    assert (table.diff() < 0).all()
    assert table[-1] > 0


def test_shift_divides_the_signal_to_noise_ratio():
    alpha_bar = torch.tensor([0.9, 0.5, 0.01], dtype=torch.float64)
    moved = shifted(alpha_bar, 16)
    torch.testing.assert_close(moved / (1 - moved), alpha_bar / (1 - alpha_bar) / 16)


# The objective


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

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        images, time = torch.randn(batch, 3, 8, 8), torch.randint(1000, (batch,))
        preds = [torch.randn(batch - 1, 3, 8, 8)]
        torch.testing.assert_close(compiled(preds, images, time), loss(preds, images, time))


# One reverse step


@pytest.mark.parametrize("file", ["step_ddim", "step_ddim_eta", "step_ddpm", "step_dynamic"])
def test_steps_match_the_official_ones(file):
    metadata, tensors = golden.read(file)
    preds, guidance = levels(tensors, "in.pred"), float(metadata["guidance"])
    x_0, x_s = process(metadata).step(
        levels(tensors, "in.x_t"),
        preds if guidance == 1 else guide(preds, guidance),
        int(metadata["t"]),
        int(metadata["t_last"]),
        eta=None if metadata["ddim_eta"] == "None" else float(metadata["ddim_eta"]),
        noise=levels(tensors, "in.noise"),
        threshold=metadata["threshold"].lower(),
    )
    for level in range(len(preds)):
        assert_golden(x_0[level], tensors[f"out.x0_{level}"])
        assert_golden(x_s[level], tensors[f"out.x_s{level}"])


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_a_perfect_prediction_of_any_kind_gives_the_image_back(prediction):
    diffusion = MatryoshkaDiffusion((1,), prediction=prediction)
    image, eps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    alpha_bar = diffusion.alpha_bar(400, 0)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    pred = {"v": a * eps - s * image, "eps": eps, "x0": image}[prediction]
    (x_0,), (x_s,) = diffusion.step([a * image + s * eps], [pred], 400, 0, eta=0)
    torch.testing.assert_close(x_0, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(x_s, image, rtol=0, atol=1e-5)


def test_the_last_step_adds_no_noise():
    diffusion = MatryoshkaDiffusion((1,))
    x, pred, noise = torch.randn(3, 2, 3, 4, 4).unbind()
    for t, eta in ((1, None), (1, 1.0), (20, None)):
        (x_0,), (x_s,) = diffusion.step([x], [pred], t, 0, eta=eta, noise=[noise])
        torch.testing.assert_close(x_s, x_0)


def test_times_may_differ_between_samples():
    diffusion = MatryoshkaDiffusion((4, 1))
    x_t = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)]
    preds, noise = ([torch.randn_like(x) for x in x_t] for _ in range(2))
    together = diffusion.step(x_t, preds, torch.tensor([700, 30]), torch.tensor([650, 10]), noise=noise)
    for i, (t, s) in enumerate([(700, 650), (30, 10)]):
        x_i, preds_i, noise_i = ([tensor[i : i + 1] for tensor in level] for level in (x_t, preds, noise))
        alone = diffusion.step(x_i, preds_i, t, s, noise=noise_i)
        for a, b in zip([*together[0], *together[1]], [*alone[0], *alone[1]], strict=True):
            torch.testing.assert_close(a[i : i + 1], b)


def test_dynamic_threshold_takes_its_quantile_over_a_whole_clip():
    diffusion = MatryoshkaDiffusion((1,), prediction="x0")
    clip = torch.zeros(1, 1, 4, 10, 10)
    clip[:, :, 0] = 3.0  # a quarter of the clip, all of one frame
    (x_0,), _ = diffusion.step([clip], [clip], 10, 5, eta=0, threshold="dynamic")
    assert x_0.max() == 1
    (x_0,), _ = diffusion.step([clip], [clip], 10, 5, eta=0, threshold="dynamic_if")
    assert x_0.max() == 1
    (x_0,), _ = diffusion.step([clip], [clip], 10, 5, eta=0, threshold="none")
    assert x_0.max() == 3


# Sampling


class GaussianDenoiser:
    """The exact v of data N(mean, deviation²): E[v | x_t], in closed form (Salimans & Ho 2022, appendix D)."""

    def __init__(self, diffusion: MatryoshkaDiffusion, mean: float, deviation: float):
        self.diffusion, self.mean, self.variance = diffusion, mean, deviation**2
        self.times: list[int] = []

    def __call__(self, x, time, context=None, context_mask=None, micro=None):
        self.times.append(time[0].item())
        preds = []
        for level, x_t in enumerate(x):
            alpha_bar = self.diffusion.alpha_bar(time + 1, level).view(-1, *[1] * (x_t.dim() - 1))
            a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            x_0 = self.mean + a * self.variance / (alpha_bar * self.variance + s**2) * (x_t - a * self.mean)
            preds.append((a * x_t - x_0) / s)
        return preds


SHAPES = [(4, 3, 32, 32), (4, 3, 8, 8)]


MEAN, DEVIATION = 0.1, 0.25


def draw(sampler: str, steps: int, seed: int = 0, **options) -> list[Tensor]:
    diffusion = MatryoshkaDiffusion((4, 1))
    generator = torch.Generator().manual_seed(seed)
    model = GaussianDenoiser(diffusion, MEAN, DEVIATION)
    return sample(model, diffusion, SHAPES, num_inference_steps=steps, sampler=sampler, generator=generator, **options)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_samplers_draw_from_the_distribution_that_the_model_knows(sampler, eta):
    """Up to the error of 1000 steps, first order and 2 % in the deviation, and four standard errors."""
    for x, shape in zip(draw(sampler, 1000, eta=eta), SHAPES, strict=True):
        assert x.shape == shape
        assert abs(x.mean() - MEAN) < 0.02 * DEVIATION + 4 * DEVIATION / x.numel() ** 0.5
        assert abs(x.std() / DEVIATION - 1) < 0.02 + 4 / (2 * x.numel()) ** 0.5


def test_ddim_converges_to_the_exact_solution_of_its_equation():
    """For Gaussian data the flow maps quantiles to quantiles: noise z ends at mean + deviation · z."""
    z = torch.randn(SHAPES[0], generator=torch.Generator().manual_seed(0))
    errors = [(draw("ddim", steps)[0] - (MEAN + DEVIATION * z)).abs().mean().item() for steps in (25, 100, 400)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02 * DEVIATION


def test_time_runs_over_the_official_grid_and_the_network_sees_one_less():
    assert time_grid(1000, 4) == [801, 601, 400, 200, 0]
    assert time_grid(1000, 1000) == list(range(1000, -1, -1))
    diffusion = MatryoshkaDiffusion((1,))
    model = GaussianDenoiser(diffusion, 0.0, 0.5)
    sample(model, diffusion, [(1, 1, 2, 2)], num_inference_steps=4)
    assert model.times == [800, 600, 399, 199]


def test_guidance_pushes_from_the_negative_context_to_the_context():
    """A model that answers with its context, so that x_0 is u + w·(c − u)."""
    diffusion = MatryoshkaDiffusion((1,), prediction="x0")
    seen = []

    def model(x, time, context, context_mask, micro):
        seen.append((context_mask, micro["scale"]))
        return [context.mean(1)[:, :1, None, None].expand_as(x[0])]

    context, negative = torch.full((2, 5, 1), 0.3), torch.full((2, 5, 1), 0.1)
    (x,) = sample(
        model, diffusion, [(2, 1, 2, 2)], context, torch.ones(2, 5), negative_context=negative,
        micro={"scale": torch.tensor([64.0, 32.0])}, guidance_scale=3.0, num_inference_steps=2,
    )  # fmt: skip
    torch.testing.assert_close(x, torch.full((2, 1, 2, 2), 0.1 + 3 * 0.2))
    assert seen[0][0].shape == (4, 5)
    assert seen[0][1].tolist() == [64, 32, 64, 32]


def test_the_same_seed_draws_the_same_sample_and_another_does_not():
    first, again, other = draw("ddpm", 5), draw("ddpm", 5), draw("ddpm", 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_with_a_generator_each_a_sample_does_not_depend_on_its_batch():
    diffusion = MatryoshkaDiffusion((4, 1))
    model = GaussianDenoiser(diffusion, 0.0, 0.3)

    def with_seeds(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shapes = [(len(seeds), 1, 8, 8), (len(seeds), 1, 2, 2)]
        return sample(model, diffusion, shapes, num_inference_steps=3, sampler="ddpm", generator=generators)

    together, alone = with_seeds(5, 6), with_seeds(6)
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))


def test_callback_sees_every_step():
    seen = []
    draw("ddim", 3, callback=lambda i, t, x_0: seen.append((i, t, len(x_0))))
    assert seen == [(0, 751, 2), (1, 500, 2), (2, 250, 2)]


# What is refused


def test_bad_arguments_are_named():
    diffusion = MatryoshkaDiffusion((4, 1))
    images, time = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    x_t = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)]
    context = torch.randn(2, 5, 7)

    def run(shapes=SHAPES, *arguments, **options):
        return sample(GaussianDenoiser(diffusion, 0, 1), diffusion, shapes, *arguments, **options)

    cases = [
        (ValueError, "schedule is 'x'", lambda: MatryoshkaDiffusion((1,), schedule="x")),
        (ValueError, "num_steps is 0", lambda: MatryoshkaDiffusion((1,), num_steps=0)),
        (ValueError, "scales is", lambda: MatryoshkaDiffusion(())),
        (ValueError, "scales is", lambda: MatryoshkaDiffusion((4, 0))),
        (ValueError, "prediction is 'x'", lambda: MatryoshkaDiffusion((1,), prediction="x")),
        (ValueError, "loss_target is 'x'", lambda: MatryoshkaDiffusion((1,), loss_target="x")),
        (ValueError, "level_weights has 1", lambda: MatryoshkaDiffusion((4, 1), level_weights=(1,))),
        (TypeError, "t is torch.float32", lambda: diffusion.alpha_bar(torch.tensor([0.5]), 0)),
        (IndexError, "t is in", lambda: diffusion.alpha_bar(torch.tensor([-1]), 0)),
        (IndexError, "t is in", lambda: diffusion.add_noise(images, torch.tensor([0, 1000]), [1, 4], seed=0)),
        (ValueError, "time has shape", lambda: diffusion.add_noise(images, time[None], [1, 4], seed=0)),
        (ValueError, "preds has 1", lambda: diffusion.per_sample_loss(x_t[:1], images, time, seed=0)),
        (ValueError, "divide", lambda: diffusion.per_sample_loss([x_t[0], x_t[0][..., :3]], images, time, seed=0)),
        (ValueError, "as wide", lambda: diffusion.per_sample_loss([x_t[0], x_t[0][..., :4]], images, time, seed=0)),
        (ValueError, "x_t has 1", lambda: diffusion.step(x_t[:1], x_t, 2, 1)),
        (ValueError, "t is 1 and s is 1", lambda: diffusion.step(x_t, x_t, 1, 1)),
        (ValueError, "eta is 2", lambda: diffusion.step(x_t, x_t, 2, 1, eta=2)),
        (ValueError, "threshold is 'x'", lambda: diffusion.step(x_t, x_t, 2, 1, threshold="x")),
        (ValueError, r"preds\[0\] has shape", lambda: diffusion.step(x_t, x_t[::-1], 2, 1)),
        (ValueError, "sampler is 'x'", lambda: run(sampler="x")),
        (ValueError, "shapes is", lambda: run(SHAPES[:1])),
        (ValueError, "num_inference_steps is 0", lambda: run(num_inference_steps=0)),
        (ValueError, "generator has 1", lambda: run(generator=[torch.Generator()])),
        (ValueError, "needs both", lambda: run(SHAPES, context, guidance_scale=2)),
        (ValueError, "negative_context", lambda: run(SHAPES, context, negative_context=context[1:], guidance_scale=2)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
