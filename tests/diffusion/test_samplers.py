"""What `sample` promises around the samplers: times, guidance, reproducibility, beginnings, refusals."""

from math import inf, nan

import pytest
import torch
from torch import Tensor

from mdm_models import create_model
from mdm_models.diffusion import SAMPLERS, MatryoshkaDiffusion, sample, seeded_generators
from tests.diffusion.gaussian_mixture import DEVIATIONS, SHAPES, GaussianMixture, batched, draw, mixture

# Time


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 1), ("ddpm", 1), ("dpmpp_2m", 1), ("heun", 2)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_any_number_of_steps_draws_something_finite(sampler, calls, steps):
    model = GaussianMixture(MatryoshkaDiffusion((1,)), SHAPES[2:], (0.1,))
    x = sample(model, model.diffusion, [(2, 3, 1, 1)], sampler=sampler, num_inference_steps=steps)
    assert x.isfinite().all()
    assert len(model.times) == steps * calls - (calls - 1)  # the last step is of first order
    assert min(model.times) >= 0


def test_the_official_samplers_take_the_official_times_and_the_network_sees_one_less():
    model = mixture()
    for sampler in ("ddim", "ddpm"):
        model.times.clear()
        draw(model, sampler=sampler, num_inference_steps=4)
        assert model.times == [800, 600, 399, 199]


def test_the_network_is_given_whole_times_as_integers_and_real_ones_as_floats():
    dtypes = []

    def model(x, time, *condition):
        dtypes.append(time.dtype)
        return x

    for sampler in ("ddim", "heun"):
        sample(model, MatryoshkaDiffusion((1,)), [(1, 1, 2, 2)], sampler=sampler, num_inference_steps=1)
    assert dtypes == [torch.int64, torch.float32]


def test_callback_sees_every_step_and_the_images_predicted_so_far():
    seen = []
    images = draw(mixture(), sampler="ddim", num_inference_steps=3, callback=lambda *step: seen.append(step))
    assert [(i, t) for i, t, _ in seen] == [(0, 751), (1, 500), (2, 250)]
    assert all(torch.equal(x_0, x) for x_0, x in zip(seen[-1][2], images, strict=True))
    assert not torch.equal(seen[0][2][0], images[0])


# Guidance


class Answers:
    """A model of x_0 that answers with its context, and keeps what it was asked."""

    def __init__(self):
        self.calls: list[tuple[int, Tensor | None, list[float], float]] = []

    def __call__(self, x, time, context, context_mask, micro):
        self.calls.append((len(x[0]), context_mask, micro["scale"].tolist(), time[0].item() + 1))
        return [context.mean(1)[:, :1, None, None].expand_as(y) for y in x]


def draw_answers(**options) -> tuple[Answers, list[Tensor]]:
    """For two samples at two levels, contexts of 0.3 against 0.1."""
    model, diffusion = Answers(), MatryoshkaDiffusion((2, 1), prediction="x0")
    images = sample(
        model,
        diffusion,
        [(2, 1, 2, 2), (2, 1, 1, 1)],
        torch.full((2, 5, 1), 0.3),
        torch.ones(2, 5),
        negative_context=torch.full((2, 5, 1), 0.1),
        micro={"scale": torch.tensor([64.0, 32.0])},
        return_levels=True,
        **{"num_inference_steps": 4} | options,
    )
    return model, images


def test_guidance_pushes_from_the_negative_context_to_the_context():
    model, images = draw_answers(guidance_scale=3.0)
    for x in images:
        torch.testing.assert_close(x, torch.full_like(x, 0.1 + 3 * 0.2))
    rows, mask, scales, _ = model.calls[0]
    assert rows == 4
    assert mask.shape == (4, 5)
    assert scales == [64, 32, 64, 32]


def test_each_level_may_have_its_guidance():
    _, (high, low) = draw_answers(guidance_scale=(1.0, 3.0))
    torch.testing.assert_close(high, torch.full_like(high, 0.3))
    torch.testing.assert_close(low, torch.full_like(low, 0.7))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_its_interval_guidance_costs_nothing(sampler):
    model, _ = draw_answers(guidance_scale=3.0, guidance_interval=(100, 500), sampler=sampler)
    for rows, mask, scales, t in model.calls:
        guided = 100 <= t <= 500
        assert rows == (4 if guided else 2)
        assert len(mask) == rows
        assert len(scales) == rows
    assert {rows for rows, *_ in model.calls} == {2, 4}


def test_without_guidance_the_model_sees_the_context_alone():
    model, (high, _) = draw_answers(guidance_scale=1)
    torch.testing.assert_close(high, torch.full_like(high, 0.3))
    assert {rows for rows, *_ in model.calls} == {2}


def test_thresholds_hold_every_prediction():
    """An image of 0.9 and 2.7: dynamic thresholds bring the larger to 1 and the smaller down with it."""

    def model(x, time, *condition):
        return [torch.tensor([0.9, 2.7]).view(1, 1, 1, 2).expand(1, 1, 2, 2)]

    diffusion = MatryoshkaDiffusion((1,), prediction="x0")
    expected = {"clip": 0.9, "dynamic": 0.9 / 2.7, "dynamic_if": 0.9 / 1.5, "none": 0.9}
    for threshold, value in expected.items():
        x = sample(model, diffusion, [(1, 1, 2, 2)], num_inference_steps=2, threshold=threshold)
        torch.testing.assert_close(x[..., 0], torch.full((1, 1, 2), value))
        assert (x[..., 1] == 1).all()


# Reproducibility


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_draws_the_same_sample_and_another_does_not(sampler):
    first, again, other = (draw(mixture(), sampler=sampler, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seeded_sample_does_not_depend_on_its_batch(sampler):
    """Up to the rounding of the model, which computes with the whole batch."""
    together = draw(mixture(), 8, sampler=sampler, seed=3)
    alone = draw(mixture(), 1, sampler=sampler, seed=None, generator=seeded_generators(3, [5]))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[5:6], b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0][4], together[0][5])


def test_the_generator_decides_what_is_drawn():
    first, again, other = (
        draw(mixture(), sampler="ddpm", seed=None, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


# Beginning from images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_a_starting_time_images_are_kept_as_far_as_their_noise_allows(sampler):
    model = GaussianMixture(MatryoshkaDiffusion((1,)), SHAPES[:1], DEVIATIONS[:1])
    images = model.draw(64)[0].float()
    distances = []
    for t in (20, 200, 900):
        options = {"sampler": sampler, "num_inference_steps": 20, "seed": 1, "start": (images, t)}
        x = sample(model, model.diffusion, batched(64)[:1], **options)
        assert max(model.times) == pytest.approx(t - 1)
        model.times.clear()
        distances.append((x - images).square().mean().sqrt().item())
    at_20 = model.diffusion.schedule.noise_levels(20)[0]
    assert distances[0] < 1.5 * at_20.sigma / at_20.alpha
    assert 3 * distances[0] < distances[2]
    assert distances[0] < distances[1] < distances[2]


def test_every_level_begins_from_the_image_at_its_resolution():
    seen = []

    def model(x, time, *condition):
        seen.append(x)
        return x

    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    diffusion = MatryoshkaDiffusion((4, 1))
    sample(model, diffusion, [(1, 1, 8, 8), (1, 1, 2, 2)], start=(image, 2), num_inference_steps=1)
    for x, clean in zip(seen[0], (image, torch.nn.functional.avg_pool2d(image, 4)), strict=True):
        assert (x - clean).abs().max() < 0.2  # at t = 2 the noise's deviation is 0.02 or less


def test_the_highest_level_is_returned_unless_all_are_asked_for():
    model = mixture()
    highest = sample(model, model.diffusion, batched(2), num_inference_steps=2, seed=0)
    every = sample(model, model.diffusion, batched(2), num_inference_steps=2, seed=0, return_levels=True)
    assert [tuple(x.shape) for x in every] == batched(2)
    assert torch.equal(highest, every[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_nested_model_of_clips_in_bf16_is_sampled_at_real_times(sampler):
    model = create_model("mdm_t2v_tiny").to(torch.bfloat16).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    context = torch.randn(2, 1, 3, 64)
    clips = sample(
        model,
        MatryoshkaDiffusion(model.config.scales),
        [(1, 3, 8, 32, 32), (1, 3, 1, 32, 32)],
        context[0],
        negative_context=context[1],
        guidance_scale=(4.0, 2.0),
        sampler=sampler,
        num_inference_steps=2,
        start=(torch.rand(1, 3, 8, 32, 32) * 2 - 1, 700.5),
        return_levels=True,
    )
    assert [tuple(clip.shape) for clip in clips] == [(1, 3, 8, 32, 32), (1, 3, 1, 32, 32)]
    for clip in clips:
        assert clip.dtype == torch.float32
        assert clip.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_in_float64_sees_and_gives_samples_in_float32(sampler):
    seen = set()

    def model(x, time, *condition):
        seen.update(level.dtype for level in x)
        return [level.double() for level in x]

    drawn = sample(model, mixture().diffusion, batched(2), sampler=sampler, num_inference_steps=3, return_levels=True)
    assert {level.dtype for level in drawn} == seen == {torch.float32}


# What is refused


def test_bad_arguments_are_named():
    model, context = mixture(), torch.randn(2, 5, 7)
    shapes = batched(2)

    def run(shapes=shapes, **options):
        return sample(model, model.diffusion, shapes, **options)

    images = torch.zeros(shapes[0])
    cases = [
        ("sampler is 'dpmp_2m'; did you mean 'dpmpp_2m'", lambda: run(sampler="dpmp_2m")),
        ("sampler is 'x'; it must be one of ddim", lambda: run(sampler="x")),
        ("eta is 2", lambda: run(eta=2)),
        ("eta is 0.5 with sampler 'heun'", lambda: run(sampler="heun", eta=0.5)),
        ("shapes is", lambda: run(shapes[:1])),
        ("shapes is", lambda: run([(1, 3, 4, 4), *shapes[1:]])),
        ("num_inference_steps is 0", lambda: run(num_inference_steps=0)),
        ("num_inference_steps is 1001", lambda: run(num_inference_steps=1001, sampler="heun")),
        ("generator has 1", lambda: run(generator=[torch.Generator()])),
        ("seed and generator", lambda: run(generator=torch.Generator(), seed=1)),
        ("seed is -1", lambda: run(seed=-1)),
        ("guidance_scale has 2", lambda: run(context=context, negative_context=context, guidance_scale=(1, 2))),
        *((f"guidance_scale is {scale}", lambda scale=scale: run(guidance_scale=scale)) for scale in (-1, nan, inf)),
        ("guidance_scale is .*-2", lambda: run(context=context, negative_context=context, guidance_scale=(4, -2, 1))),
        ("guidance_interval is", lambda: run(guidance_interval=(500, 100))),
        ("guidance_interval is 500", lambda: run(guidance_interval=500)),
        ("needs both", lambda: run(context=context, guidance_scale=2)),
        ("negative_context has", lambda: run(context=context, negative_context=context[1:], guidance_scale=2)),
        ("start has images", lambda: run(start=(images[:1], 500))),
        ("start has time 1;", lambda: run(start=(images, 1))),
        ("start has time 1001", lambda: run(start=(images, 1001))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
