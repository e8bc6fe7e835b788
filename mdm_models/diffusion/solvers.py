"""The reverse process: from noise to images, by one rule or another.

A solver is a generator that walks through falling times and yields, after each step, the time at which it began, the
images x_0 predicted there, and x at its end. The rules of one step stand first. Each holds for one level: levels share
the time, not the noise, and what a rule takes from the time is the NoiseLevel at its start and at its end. Coefficients
are float64 numbers or tensors that stand beside x; x_s takes x's dtype.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdm_models.diffusion.schedule import NoiseLevel

Levels = list[Tensor]  # one tensor a level, highest resolution first


def snr_ratio(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """Give the signal-to-noise ratio at t divided by that at s: 0…1, and 0 where s has no noise."""
    return torch.exp(2 * (t.half_logsnr - s.half_logsnr))


def ddpm_step(x: Tensor, x_0: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor) -> Tensor:
    """Draw x_s from the posterior q(x_s | x_t, x_0) (Ho et al. 2020, equations 6 and 7; Kingma et al. 2021,
    "Variational Diffusion Models", equations 25 and 26, for any t and s)."""
    ratio = snr_ratio(t, s)
    mean = s.alpha * (1 - ratio) * x_0 + ratio * s.alpha / t.alpha * x
    return mean + s.sigma * (1 - ratio).sqrt() * noise


def ddim_step(x: Tensor, x_0: Tensor, t: NoiseLevel, s: NoiseLevel, eta: float, noise: Tensor | None) -> Tensor:
    """Step to s with η of the posterior's deviation as fresh noise, and the rest along the noise that is in x (Song et
    al. 2021, equations 12 and 16). eta 0 needs no noise; eta 1 has the posterior's variance."""
    if eta == 0:
        return flow_step(x, x_0, t, s)
    if noise is None:
        raise ValueError(f"noise is None; eta {eta} needs noise of the shape of x, {tuple(x.shape)}")
    variance = eta**2 * (1 - snr_ratio(t, s))  # of the fresh noise, as a share of s.sigma²
    eps = (x - t.alpha * x_0) / t.sigma
    return s.alpha * x_0 + s.sigma * ((1 - variance).sqrt() * eps + variance.sqrt() * noise)


def flow_step(x: Tensor, x_0: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """Step to s by the probability-flow ODE d(x/σ) / d(α/σ) = x_0, solved for constant x_0.

    The ODE is Lu et al. 2022, "DPM-Solver++", proposition 4.1, with e^λ = α/σ. This is Euler's method for it, which is
    DDIM without fresh noise; the methods of second order put in for x_0 a better mean over the step. Where s has no
    noise the result is x_0.
    """
    return s.sigma / t.sigma * x - s.alpha * torch.expm1(t.half_logsnr - s.half_logsnr) * x_0


@dataclass(frozen=True)
class Process:
    """What a solver asks for on its way: what x_t is made of, predicted images, and fresh noise."""

    noise_levels: Callable[[float], list[NoiseLevel]]  # at a time, one a level
    denoise: Callable[[Levels, float], Levels]  # (x_t, t) → the predicted images x_0, by one call of the network
    draw_noise: Callable[[], Levels]  # standard normal numbers, of x's shapes


Steps = Iterator[tuple[float, Levels, Levels]]  # t, x_0, x_s


def ddpm(process: Process, x: Levels, times: Sequence[float]) -> Steps:
    """Walk through the times by `ddpm_step`, with fresh noise at every step: ancestral sampling."""
    for t, s in itertools.pairwise(times):
        x_0 = process.denoise(x, t)
        at_t, at_s = process.noise_levels(t), process.noise_levels(s)
        x = [ddpm_step(*level) for level in zip(x, x_0, at_t, at_s, process.draw_noise(), strict=True)]
        yield t, x_0, x


def ddim(process: Process, x: Levels, times: Sequence[float], eta: float = 0.0) -> Steps:
    """Walk through the times by `ddim_step`; at eta 0 it draws no noise and is of first order."""
    for t, s in itertools.pairwise(times):
        x_0 = process.denoise(x, t)
        at_t, at_s = process.noise_levels(t), process.noise_levels(s)
        noise = process.draw_noise() if eta else [None] * len(x)
        x = [ddim_step(y, y_0, a, b, eta, e) for y, y_0, a, b, e in zip(x, x_0, at_t, at_s, noise, strict=True)]
        yield t, x_0, x


def dpmpp_2m(process: Process, x: Levels, times: Sequence[float]) -> Steps:
    """Walk through the times by DPM-Solver++(2M): the mean over a step is extrapolated from this prediction and the one
    before (Lu et al. 2022, "DPM-Solver++", algorithm 2). Second order for one network call a step.

    Two steps are of first order: the first has no prediction before it, and the last ends without noise, at λ = ∞, to
    which nothing can be extrapolated.
    """
    before = None  # the prediction before this one, and its half logsnr
    for t, s in itertools.pairwise(times):
        x_0 = process.denoise(x, t)
        at_t, at_s = process.noise_levels(t), process.noise_levels(s)
        half_logsnr, half_logsnr_next = at_t[0].half_logsnr, at_s[0].half_logsnr  # their differences are all levels'
        mean = x_0
        if before is not None and s > 0:
            x_0_before, half_logsnr_before = before
            half_r = (half_logsnr_next - half_logsnr) / (half_logsnr - half_logsnr_before) / 2  # 1 / 2r of the paper
            mean = [y_0 + half_r * (y_0 - y_before) for y_0, y_before in zip(x_0, x_0_before, strict=True)]
        x = [flow_step(*level) for level in zip(x, mean, at_t, at_s, strict=True)]
        yield t, x_0, x
        before = x_0, half_logsnr


def heun(process: Process, x: Levels, times: Sequence[float]) -> Steps:
    """Walk through the times by Heun's method: the mean over a step is that of the predictions at its start and at the
    end that Euler's method finds. Second order for two network calls a step; the last step, without noise at its end,
    has one.

    Karras et al. 2022, algorithm 1, apply it to d(x/α) / d(σ/α) = ε, which is the same ODE. In that variable the step
    from nearly pure noise, where σ/α falls from thousands to tens, magnifies every error; in α/σ it is a small step.
    """
    for t, s in itertools.pairwise(times):
        x_0 = mean = process.denoise(x, t)
        at_t, at_s = process.noise_levels(t), process.noise_levels(s)
        if s > 0:
            euler = [flow_step(*level) for level in zip(x, x_0, at_t, at_s, strict=True)]
            mean = [(y_0 + end) / 2 for y_0, end in zip(x_0, process.denoise(euler, s), strict=True)]
        x = [flow_step(*level) for level in zip(x, mean, at_t, at_s, strict=True)]
        yield t, x_0, x
