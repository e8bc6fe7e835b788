"""Power-function averages on paper: their widths, and how to make one of any width from others that were kept.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (CVPR 2024, arXiv
2312.02696), sections 3.1 and 3.2 and appendix C. An average at time T gives the weights of time t ≤ T the share
p(t) = (γ + 1) t^γ / T^(γ + 1), its profile, whose standard deviation is the same part of T at any T: the width, `std`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def exponent(std: float) -> float:
    """Find γ of the power function whose width is `std`. Raises ValueError unless std lies between 0 and 1/√12."""
    if not 0 < std < 12**-0.5:
        raise ValueError(f"std is {std}; it must lie between 0 and {12**-0.5:.3f}, the width of a plain mean")
    # std² = (γ + 1) / ((γ + 2)² (γ + 3)), multiplied out
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real.max())


@dataclass(frozen=True)
class Profile:
    """The average of width `std` at a time, counted in updates: which share each moment of training has in it."""

    std: float
    updates: int


@dataclass(frozen=True)
class Combination:
    """Weights of kept averages that together come closest to a wanted one."""

    weights: np.ndarray
    """one a kept average, float64; they sum to 1, so that what no update changed stays as it is"""
    distance: float
    """‖wanted profile − combined profile‖₂, in 1/√updates: a parameter that over the run strayed from its mean by
    deviations of Euclidean norm D (over all updates) comes out wrong by at most distance · D"""
    relative_distance: float
    """distance over the norm of the wanted profile"""


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """Find the least-squares combination of the profiles `kept` to the profile `wanted` (the paper's appendix C.3, with
    the condition that the weights sum to 1)."""
    among = _inner(kept, kept)
    with_wanted = _inner(kept, [wanted])[:, 0]
    norm = math.sqrt(_inner([wanted], [wanted])[0, 0])
    scale = np.diag(among) ** -0.5  # profiles of unit norm: those of early times are thousands of times higher
    count = len(kept)
    system = np.zeros((count + 1, count + 1))  # the last row, and a Lagrange multiplier, for the sum
    system[:count, :count] = scale[:, None] * among * scale
    system[count, :count] = system[:count, count] = scale / scale.max()
    right = np.append(scale * with_wanted, 1 / scale.max())
    weights = scale * np.linalg.lstsq(system, right, rcond=None)[0][:count]
    weights /= weights.sum()  # to the last bit
    squared = norm**2 - 2 * weights @ with_wanted + weights @ among @ weights
    distance = math.sqrt(max(squared, 0.0))
    return Combination(weights, distance, distance / norm)


def _inner(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """∫ p q dt of every profile of `first` with every one of `second`, float64."""
    a, b = (np.array([exponent(profile.std) for profile in profiles]) for profiles in (first, second))
    t, u = (np.array([float(profile.updates) for profile in profiles]) for profiles in (first, second))
    a, t = a[:, None], t[:, None]
    until = np.minimum(t, u)
    return (a + 1) * (b + 1) / (a + b + 1) * (until / t) ** a * (until / u) ** b * until / (t * u)
