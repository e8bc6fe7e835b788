"""The noise schedule, the times and one reverse step, against numbers of the official code and against definitions."""

import json

import pytest
import torch
from torch import Tensor

from mdm_models.diffusion import (
    MatryoshkaDiffusion,
    alpha_bar_table,
    continuous_times,
    discrete_times,
    guide,
    logit_normal_times,
    time_grid,
)
from mdm_models.diffusion.schedule import SCHEDULES
from mdm_models.diffusion.thresholding import thresholded
from mdm_models.diffusion.times import quadratic_times
from tests.models import golden


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
    diffusion = MatryoshkaDiffusion((4, 1), shift_power=2)
    high, low = diffusion.schedule.noise_levels(400)
    torch.testing.assert_close((high.alpha / high.sigma) ** 2, (low.alpha / low.sigma) ** 2 / 16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_between_whole_times_noise_arrives_at_a_constant_rate(schedule):
    """ᾱ falls by the same factor in each half of a step, and the first and last steps are no exception."""
    diffusion = MatryoshkaDiffusion((1,), schedule=schedule)
    for t in (0, 1, 500, 999):
        before, middle, after = (diffusion.schedule.noise_levels(time)[0].alpha ** 2 for time in (t, t + 0.5, t + 1))
        torch.testing.assert_close(middle / before, after / middle)


def test_times_in_a_tensor_have_the_noise_of_numbers():
    diffusion = MatryoshkaDiffusion((16, 1))
    times = [0, 0.25, 1, 333.5, 999.75, 1000]
    for level in range(2):
        together = diffusion.alpha_bar(torch.tensor(times), level)
        alone = torch.stack([diffusion.alpha_bar(t, level) for t in times])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
        whole = diffusion.alpha_bar(torch.tensor([0, 1, 1000]), level)
        torch.testing.assert_close(whole, alone[[0, 2, 5]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [0, 1e-3, 1, 999, 1000])
def test_the_noises_share_is_exact_at_either_end(t):
    diffusion = MatryoshkaDiffusion((16, 1), shift_power=2)
    for at_t in diffusion.schedule.noise_levels(t):
        torch.testing.assert_close(at_t.alpha**2 + at_t.sigma**2, torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(torch.log(at_t.alpha / at_t.sigma), at_t.half_logsnr)


# Times


FRACTIONS = (torch.arange(10_000) + 0.5) / 10_000


def test_discrete_times_are_each_as_frequent():
    counts = torch.bincount(discrete_times(FRACTIONS, 1000), minlength=1000)
    assert (counts == 10).all()
    assert discrete_times(torch.tensor([1 - 2**-24]), 1000) == 999


def test_continuous_times_are_uniform_between_the_least_and_the_most_noise():
    times = continuous_times(FRACTIONS, 1000)
    torch.testing.assert_close(times, torch.linspace(0, 999, 20_001)[1::2])


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.5, 0.7)])
def test_logit_normal_times_have_a_normal_logit(mean, deviation):
    logits = torch.logit(logit_normal_times(FRACTIONS.double(), 1000, mean, deviation) / 999)
    assert abs(logits.mean() - mean) < 1e-3
    assert abs(logits.std() - deviation) < 1e-3
    inside = (logits - mean).abs() < deviation
    assert abs(inside.double().mean() - 0.6827) < 1e-3


def test_extreme_fractions_give_times_that_a_model_takes():
    diffusion = MatryoshkaDiffusion((4, 1))
    fractions = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    for times in (continuous_times(fractions, 1000), logit_normal_times(fractions, 1000)):
        assert (times >= 0).all()
        assert diffusion.training_alpha_bars(times).isfinite().all()


def test_the_grid_of_times_is_the_official_one():
    assert time_grid(1000, 4) == [801, 601, 400, 200, 0]
    assert time_grid(1000, 1000) == list(range(1000, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("start", [1000, 3.5])
def test_quadratic_times_are_evenly_spaced_roots_down_to_one(start, steps):
    times = quadratic_times(start, steps)
    assert len(times) == steps + 1
    assert times[0] == start
    assert times[-1] == 0
    roots = torch.tensor(times[:-1], dtype=torch.float64).sqrt()
    torch.testing.assert_close(roots, torch.linspace(start**0.5, 1, max(steps, 2), dtype=torch.float64)[:steps])


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


def test_ddim_with_all_of_its_noise_is_ddpm():
    diffusion = MatryoshkaDiffusion((1,))
    x, pred, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64).unbind()
    for t, s in ((1000, 700), (40, 3), (5, 0)):
        _, by_ddpm = diffusion.step([x], [pred], t, s, noise=[noise])
        _, by_ddim = diffusion.step([x], [pred], t, s, eta=1.0, noise=[noise])
        torch.testing.assert_close(by_ddim, by_ddpm)


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


def test_a_dynamic_threshold_takes_a_clip_of_any_length():
    clip = torch.linspace(0, 2, 2**24 + 8).view(1, 1, -1, 2, 2)  # torch.quantile of torch 2.11 refuses as many numbers
    assert thresholded(clip, "dynamic").flatten()[2**23].item() == pytest.approx(1 / 1.99, rel=1e-6)


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


def test_steps_of_float64_stay_float64():
    diffusion = MatryoshkaDiffusion((1,), prediction="x0")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for eta in (None, 0.0, 0.5):
        (x_0,), (x_s,) = diffusion.step([x], [x / 9], 500.5, 400.25, eta=eta)
        assert x_0.dtype == x_s.dtype == torch.float64


def test_guidance_may_differ_between_levels():
    preds = [torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])]
    high, low = guide(preds, (3.0, 0.5))
    assert high == 3
    assert low == 3


# What is refused


def test_bad_arguments_are_named():
    diffusion = MatryoshkaDiffusion((4, 1))
    x_t = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)]
    cases = [
        (ValueError, "schedule is 'x'", lambda: MatryoshkaDiffusion((1,), schedule="x")),
        (ValueError, "num_steps is 0", lambda: MatryoshkaDiffusion((1,), num_steps=0)),
        (ValueError, "scales is", lambda: MatryoshkaDiffusion(())),
        (ValueError, "scales is", lambda: MatryoshkaDiffusion((4, 0))),
        (TypeError, "t is torch.bool", lambda: diffusion.alpha_bar(torch.tensor([True]), 0)),
        (ValueError, "t is in -1", lambda: diffusion.alpha_bar(torch.tensor([-1]), 0)),
        (ValueError, "t is in 1000.5", lambda: diffusion.alpha_bar(1000.5, 0)),
        (ValueError, "t is in nan", lambda: diffusion.alpha_bar(torch.tensor([float("nan")]), 0)),
        (ValueError, "x_t has 1", lambda: diffusion.step(x_t[:1], x_t, 2, 1)),
        (ValueError, "t is 1 and s is 1", lambda: diffusion.step(x_t, x_t, 1, 1)),
        (ValueError, "eta is 2", lambda: diffusion.step(x_t, x_t, 2, 1, eta=2)),
        (ValueError, "threshold is 'x'", lambda: diffusion.step(x_t, x_t, 2, 1, threshold="x")),
        (ValueError, r"preds\[0\] has shape", lambda: diffusion.step(x_t, x_t[::-1], 2, 1)),
        (ValueError, "num_inference_steps is 0", lambda: time_grid(1000, 0)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
