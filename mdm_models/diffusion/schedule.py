"""Noise schedules: tables of ᾱ_t = Π(1 − β), the share of an image's variance left at step t."""

import math

import torch
from torch import Tensor

SCHEDULES = ("deepfloyd", "ddpm", "cosine")


def alpha_bar_table(schedule: str, num_steps: int) -> Tensor:
    """ᾱ_0 … ᾱ_num_steps as float64 (num_steps + 1,), falling from ᾱ_0 = 1.

    "deepfloyd": squared cosine, β ≤ 0.999 (Nichol & Dhariwal 2021, equation 17). "ddpm": β linear from 1e-4 to 0.02
    (Ho et al. 2020, section 4). "cosine": log SNR from 5 to −5 along a cosine (Salimans & Ho 2022, appendix E).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    after_first = {"deepfloyd": _squared_cosine, "ddpm": _linear_beta, "cosine": _cosine_logsnr}[schedule](num_steps)
    return torch.cat([torch.ones(1, dtype=torch.float64), after_first])


def _squared_cosine(num_steps: int) -> Tensor:
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def _linear_beta(num_steps: int) -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)).cumprod(0)


def _cosine_logsnr(num_steps: int) -> Tensor:
    first, last = math.atan(math.exp(-2.5)), math.atan(math.exp(2.5))
    return torch.linspace(first, last, num_steps, dtype=torch.float64).cos().square()


def shifted(alpha_bar: Tensor, factor: float) -> Tensor:
    """ᾱ with the signal-to-noise ratio ᾱ / (1 − ᾱ) divided by `factor`; ᾱ = 1 stays 1.

    Averaging s² pixels divides their noise's variance by s², so that the same noise hides less of a larger image
    (Hoogeboom et al. 2023, section 2.1; Matryoshka Diffusion Models, section 3.2).
    """
    return alpha_bar / (alpha_bar + factor * (1 - alpha_bar))
