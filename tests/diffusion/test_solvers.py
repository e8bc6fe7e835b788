"""Samplers against a distribution whose score and probability flow are known: their order, and what they draw."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from mdm_models.diffusion import MatryoshkaDiffusion, seeded_generators
from mdm_models.diffusion.noise import draw_noise
from mdm_models.diffusion.solvers import Process, ddim, ddpm
from mdm_models.diffusion.times import quadratic_times
from tests.diffusion.gaussian_mixture import DEVIATIONS, SHAPES, GaussianMixture, batched, draw, mixture, slope_of

# Order of convergence


@functools.cache
def flow_from_noise() -> list[Tensor]:
    """Where the probability flow takes noise: exactly to t = 1, from where every sampler ends with the posterior mean.

    The noise is that of seed 0 at t = 1000.
    """
    model = mixture()
    start, end = (model.diffusion.schedule.noise_levels(t) for t in (1000, 1))
    generators = seeded_generators(0, range(4))
    noise = [draw_noise(shape, generators, torch.device("cpu")).double() for shape in batched(4)]
    x_1 = model.flow([at.sigma * eps for at, eps in zip(start, noise, strict=True)], 1000, 1, steps=300)
    return model.posterior_mean(x_1, end)


@pytest.mark.parametrize(
    ("sampler", "prediction", "order"),
    [
        ("ddim", "v", 1),
        ("dpmpp_2m", "v", 2),
        ("dpmpp_2m", "eps", 2),
        ("dpmpp_2m", "x0", 2),
        ("heun", "v", 2),
        ("heun", "eps", 2),
        ("heun", "x0", 2),
    ],
)
def test_the_error_falls_at_the_samplers_order(sampler, prediction, order):
    model = mixture(prediction)
    start = torch.zeros(4, *SHAPES[0], dtype=torch.float64), 1000
    drawn = {n: draw(model, sampler=sampler, num_inference_steps=n, start=start) for n in (40, 80, 160)}
    for level, expected in enumerate(flow_from_noise()):
        errors = {n: (images[level] - expected).square().mean().sqrt().item() for n, images in drawn.items()}
        assert order - 0.15 < slope_of(errors) < order + 0.25
        assert errors[160] < 0.03 * DEVIATIONS[level]


def test_second_order_from_noise_beats_first_order_with_five_times_the_steps():
    """From noise, on the times that each sampler takes by itself."""
    model = mixture()
    few = {name: draw(model, sampler=name, num_inference_steps=20) for name in ("dpmpp_2m", "heun")}
    many = draw(model, sampler="ddim", num_inference_steps=100)
    for level, expected in enumerate(flow_from_noise()):
        errors = {name: (images[level] - expected).square().mean() for name, images in few.items()}
        assert max(errors.values()) < (many[level] - expected).square().mean()


# Distribution


def marginal_errors(model: GaussianMixture, samples: list[Tensor], t: float) -> list[tuple[float, float]]:
    """Largest error of an element's mean and variance at t, in standard errors, at each level."""
    errors = []
    for level, (x, at) in enumerate(zip(samples, model.diffusion.schedule.noise_levels(t), strict=True)):
        mean, variance = model.moments(level)
        mean, variance = at.alpha * mean, at.alpha**2 * variance + at.sigma**2
        of_mean = (x.double().mean(0) - mean).abs() / (variance / len(x)).sqrt()
        of_variance = (x.double().var(0) - variance).abs() / (variance * (2 / len(x)) ** 0.5)
        errors.append((of_mean.max().item(), of_variance.max().item()))
    return errors


@pytest.mark.parametrize(
    ("sampler", "eta", "steps"),
    [("ddpm", 0, 200), ("ddim", 0.5, 200), ("ddim", 0, 60), ("dpmpp_2m", 0, 30), ("heun", 0, 30)],
)
def test_samples_have_the_moments_of_the_data(sampler, eta, steps):
    """63 means and variances stay within 4.5 standard errors, beside which the bias of so many steps is about one."""
    model = mixture()
    options = {"start": (torch.zeros(1200, *SHAPES[0]), 1000), "seed": None, "generator": torch.Generator()}
    samples = draw(model, 1200, sampler=sampler, eta=eta, num_inference_steps=steps, **options)
    for of_mean, of_variance in marginal_errors(model, samples, 0):
        assert of_mean < 5.5
        assert of_variance < 5.5


@pytest.mark.parametrize("solver", [ddpm, functools.partial(ddim, eta=0.5), ddim], ids=["ddpm", "ddim 0.5", "ddim"])
def test_solvers_carry_one_marginal_into_another(solver):
    """From x_t that has the distribution at t = 700 to x_s that has that at 300, in 50 steps."""
    model = mixture()
    schedule = model.diffusion.schedule
    x_0 = model.draw(2500)
    x_t = [at.alpha * x + at.sigma * torch.randn_like(x) for x, at in zip(x_0, schedule.noise_levels(700), strict=True)]
    process = Process(
        schedule.noise_levels,
        lambda x, t: model.posterior_mean(x, schedule.noise_levels(t)),
        lambda: [torch.randn_like(x) for x in x_t],
    )
    *_, (_, _, x_s) = solver(process, x_t, [700 - 8 * i for i in range(51)])
    for of_mean, of_variance in marginal_errors(model, x_s, 300):
        assert of_mean < 5.5
        assert of_variance < 5.5


def test_ddpms_variance_converges_at_first_order():
    """For Gaussian data a step is affine in x and noise, so that the samples' variance is known without drawing any."""
    schedule = MatryoshkaDiffusion((4,)).schedule
    variance = 0.3**2

    def posterior_mean(x: list[Tensor], t: float) -> list[Tensor]:
        (at,) = schedule.noise_levels(t)
        return [at.alpha * variance / (at.alpha**2 * variance + at.sigma**2) * x[0]]

    def variance_after(steps: int) -> float:
        times = quadratic_times(1000, steps)
        drawn = torch.tensor(1.0, dtype=torch.float64)
        for t, s in itertools.pairwise(times):
            factors = []
            for x, eps in ((1.0, 0.0), (0.0, 1.0)):
                x, eps = (torch.tensor(value, dtype=torch.float64) for value in (x, eps))
                process = Process(schedule.noise_levels, posterior_mean, lambda eps=eps: [eps])
                ((_, _, (x_s,)),) = ddpm(process, [x], [t, s])
                factors.append(x_s)
            drawn = factors[0] ** 2 * drawn + factors[1] ** 2
        return drawn.item()

    errors = {steps: abs(variance_after(steps) / variance - 1) for steps in (50, 100, 200)}
    assert 0.85 < slope_of(errors) < 1.15
    assert errors[200] < 0.05
