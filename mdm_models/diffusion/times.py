"""The times at which a model is trained, and the times through which a sampler steps.

A network at x_t, 0 < t ≤ num_steps, is given the time t − 1. Training draws what the network is given; samplers step
through t.
"""

import math
import numbers

import torch
from torch import Tensor


def discrete_times(fractions: Tensor, num_steps: int) -> Tensor:
    """Turn fractions in 0…1, uniform and 1 excluded, into the network's times, uniform among 0, 1 … num_steps−1; int64.

    Taking fractions leaves it to the caller how they are drawn: independently, or spread evenly over a batch.
    """
    return (fractions * num_steps).long().clamp_max(num_steps - 1)  # float32 rounds 0.99999997 · 1000 up to 1000


def continuous_times(fractions: Tensor, num_steps: int) -> Tensor:
    """Turn fractions in 0…1, uniform, into the network's times, uniform among the real numbers in 0…num_steps−1.

    The noise lies between the least and the most of `discrete_times`: without any, x_t would tell nothing of ε.
    """
    return fractions * (num_steps - 1)


def logit_normal_times(fractions: Tensor, num_steps: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """Turn fractions in 0…1, uniform, into the network's times in 0…num_steps−1, their share of it logit-normal.

    Most lie in the middle, where there is most to learn; mean > 0 moves them towards noise (Esser et al. 2024, "Scaling
    Rectified Flow Transformers", equation 19; mean 0 and deviation 1 are what they chose).
    """
    return torch.sigmoid(mean + deviation * torch.special.ndtri(fractions)) * (num_steps - 1)


def time_grid(num_steps: int, num_inference_steps: int) -> list[int]:
    """Give the official code's whole times, num_inference_steps + 1 of them: multiples of (num_steps + 1) /
    (num_inference_steps + 1), rounded, down to 0. They start below num_steps, from what is taken for pure noise."""
    check_step_count(num_steps, num_inference_steps)
    spacing = (num_steps + 1) / (num_inference_steps + 1)
    return [round(i * spacing) for i in range(num_inference_steps, -1, -1)]


def quadratic_times(start: float, num_inference_steps: int) -> list[float]:
    """Give num_inference_steps + 1 real times from `start` > 1 down to 1, evenly spaced in √t, and then 0.

    Near t = 0 the noise's deviation falls like √t: evenly spaced times leave the end to steps too coarse for a sampler
    to reach second order. Song et al. 2021, "Denoising Diffusion Implicit Models", appendix D.2, space whole times so.
    At t = 1 there is the least noise that models are trained on.
    """
    last = max(num_inference_steps - 1, 1)
    roots = [math.sqrt(start) + (1 - math.sqrt(start)) * i / last for i in range(num_inference_steps)]
    return [float(start), *(root**2 for root in roots[1:]), 0.0]


def check_step_count(num_steps: int, num_inference_steps: int) -> None:
    """Raise TypeError unless num_inference_steps is an integer, ValueError unless it is in 1…num_steps."""
    if not isinstance(num_inference_steps, numbers.Integral):
        raise TypeError(f"num_inference_steps is {num_inference_steps!r}; it must be an integer")
    if not 1 <= num_inference_steps <= num_steps:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be in 1…{num_steps}")
