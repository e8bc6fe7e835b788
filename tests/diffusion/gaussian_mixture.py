"""Data whose every posterior is known: a Gaussian mixture over the levels of tiny images.

Component k has weight w_k; given k, levels are independent, N(mean_k, deviation² · I) each. What is predicted at one
level depends on x_t at all of them, as in a nested model.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_models.diffusion import MatryoshkaDiffusion, sample
from mdm_models.diffusion.schedule import NoiseLevel

SHAPES = [(3, 4, 4), (3, 2, 2), (3, 1, 1)]  # one sample's, at each level
SCALES = (16, 4, 1)
DEVIATIONS = (0.12, 0.1, 0.08)


class GaussianMixture:
    """As a model, it predicts the exact posterior mean, as the diffusion process's kind of prediction; float64.

    shapes: each level's (C, H, W). deviations: one a level.
    """

    def __init__(self, diffusion: MatryoshkaDiffusion, shapes: Sequence[tuple[int, ...]], deviations: Sequence[float]):
        generator = torch.Generator().manual_seed(0)
        self.diffusion, self.shapes, self.deviations = diffusion, shapes, deviations
        self.weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        self.means = [0.15 * torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.times: list[float] = []  # what the model was called at

    def __call__(self, x, time, context=None, context_mask=None, micro=None) -> list[Tensor]:
        self.times.append(time[0].item())
        at_t = self.diffusion.schedule.noise_levels(self.times[-1] + 1)
        images = self.posterior_mean(x, at_t)
        if self.diffusion.prediction == "x0":
            return images
        eps = [(y - n.alpha * y_0) / n.sigma for y, y_0, n in zip(x, images, at_t, strict=True)]
        if self.diffusion.prediction == "eps":
            return eps
        return [n.alpha * e - n.sigma * y_0 for e, y_0, n in zip(eps, images, at_t, strict=True)]

    def posterior_mean(self, x: Sequence[Tensor], at_t: Sequence[NoiseLevel]) -> list[Tensor]:
        """E[x_0 | x_t of every level], one tensor (B, *shape) a level."""
        log_share, given = self.weights.log(), []
        for y, n, means, deviation in zip(x, at_t, self.means, self.deviations, strict=True):
            variance = n.alpha**2 * deviation**2 + n.sigma**2
            residual = y[:, None] - n.alpha * means  # (B, 3, *shape)
            log_share = log_share - ((residual**2 / variance + variance.log()) / 2).flatten(2).sum(2)
            given.append(means + n.alpha * deviation**2 / variance * residual)
        share = log_share.softmax(1)  # (B, 3)
        return [torch.einsum("bk,bk...->b...", share, component) for component in given]

    def moments(self, level: int) -> tuple[Tensor, Tensor]:
        """The mean and the variance of every element of a level, each of its shape."""
        weights, means = self.weights.view(3, 1, 1, 1), self.means[level]
        mean = (weights * means).sum(0)
        return mean, (weights * means**2).sum(0) - mean**2 + self.deviations[level] ** 2

    def draw(self, count: int) -> list[Tensor]:
        """Samples of the data, (count, *shape) a level."""
        component = torch.multinomial(self.weights, count, replacement=True)
        return [
            means[component] + deviation * torch.randn(count, *shape, dtype=torch.float64)
            for means, deviation, shape in zip(self.means, self.deviations, self.shapes, strict=True)
        ]

    def flow(self, x: Sequence[Tensor], t: float, s: float, steps: int) -> list[Tensor]:
        """The probability-flow ODE from t to s, 0 < s < t, by the classical Runge–Kutta method over angles.

        With α = cos φ and σ = sin φ it is dx/dφ = v (Salimans & Ho 2022, appendix D), so dx/dλ = −α·σ·v.
        """
        ends = [[n.half_logsnr for n in self.diffusion.schedule.noise_levels(time)] for time in (t, s)]

        def slope(x: Sequence[Tensor], progress: float) -> list[Tensor]:
            at = [NoiseLevel(a + progress * (b - a)) for a, b in zip(*ends, strict=True)]
            images = self.posterior_mean(x, at)
            return [
                (a - b) * n.alpha * (n.alpha * y - y_0)  # σ·v = α·x − x_0
                for y, y_0, n, a, b in zip(x, images, at, *ends, strict=True)
            ]

        def moved(x: Sequence[Tensor], slopes: Sequence[Tensor], by: float) -> list[Tensor]:
            return [y + by * k for y, k in zip(x, slopes, strict=True)]

        h, x = 1 / steps, list(x)
        for i in range(steps):
            k1 = slope(x, i * h)
            k2 = slope(moved(x, k1, h / 2), (i + 0.5) * h)
            k3 = slope(moved(x, k2, h / 2), (i + 0.5) * h)
            k4 = slope(moved(x, k3, h), (i + 1) * h)
            x = [y + h / 6 * (a + 2 * b + 2 * c + d) for y, a, b, c, d in zip(x, k1, k2, k3, k4, strict=True)]
        return x


def mixture(prediction: str = "v") -> GaussianMixture:
    """Over three levels, for a model that predicts v, eps or x0."""
    return GaussianMixture(MatryoshkaDiffusion(SCALES, prediction=prediction), SHAPES, DEVIATIONS)


def batched(count: int) -> list[tuple[int, ...]]:
    """The shapes of a batch at every level."""
    return [(count, *shape) for shape in SHAPES]


def draw(model: GaussianMixture, count: int = 4, **options) -> list[Tensor]:
    """`count` samples at every level, unclipped on the way; options are those of `sample`."""
    options = {"threshold": "none", "num_inference_steps": 10, "seed": 0} | options
    return sample(model, model.diffusion, batched(count), return_levels=True, **options)


def slope_of(errors: dict[int, float]) -> float:
    """The order p of errors ∝ 1 / stepsᵖ, between the fewest and the most steps."""
    few, many = min(errors), max(errors)
    return math.log(errors[few] / errors[many]) / math.log(many / few)
