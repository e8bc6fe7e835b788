"""Noise schedules: how much of an image is left at time t, at every level.

Time t runs from 0, where x_t is the image, to num_steps. ᾱ_t is the image's share of the variance of x_t: at whole
times from a table, between them interpolated, so that a model trained on whole times runs at any time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

SCHEDULES = ("deepfloyd", "ddpm", "cosine")
Time = float | Tensor  # one time for all samples, or a tensor of times


@dataclass(frozen=True)
class NoiseLevel:
    """What x_t = alpha·x_0 + sigma·ε is made of, alpha² + sigma² = 1.

    half_logsnr: λ = log(alpha / sigma), ∞ where there is no noise. It gives both coefficients to the last digit, even
    where one is nearly 0; ᾱ does not, as 1 − ᾱ loses digits.
    """

    half_logsnr: Tensor

    @cached_property
    def alpha(self) -> Tensor:
        """The image's coefficient in x_t, √ᾱ, in the shape of half_logsnr."""
        return torch.sigmoid(2 * self.half_logsnr).sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """The noise's coefficient in x_t, √(1−ᾱ), in the shape of half_logsnr."""
        return torch.sigmoid(-2 * self.half_logsnr).sqrt()


class NoiseSchedule(nn.Module):
    """Gives ᾱ and λ of every level at any real time in 0…num_steps.

    Between whole times log ᾱ is linear: noise arrives at a constant rate β within each step of the discrete process.
    Level i has its signal-to-noise ratio divided by scales[i] ** shift_power, that is, λ lowered by a constant:
    averaging s² pixels divides their noise's variance by s², so that the same noise hides less of a larger image
    (Hoogeboom et al. 2023, section 2.1; Matryoshka Diffusion Models, section 3.2).
    """

    def __init__(self, name: str, num_steps: int, scales: Sequence[float], shift_power: float):
        super().__init__()
        self.num_steps = num_steps
        self.log_snr_shifts = [shift_power * math.log(scale) for scale in scales]
        # For one time, as in sampling: in float64, and on the CPU, where looking a number up stalls no GPU.
        table = alpha_bar_table(name, num_steps).log()
        self.exact_log_alpha_bars = table.cpu()
        # For a tensor of times, as in training.
        self.register_buffer("log_alpha_bars", table.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoiseSchedule":
        """What .to() does: the table is moved and never cast, which would round the noise of every time."""
        table = self.log_alpha_bars
        super()._apply(fn, recurse)
        self.log_alpha_bars = table.to(self.log_alpha_bars.device)
        return self

    def noise_levels(self, t: Time) -> list[NoiseLevel]:
        """Give what x_t is made of at every level: () float64 on the CPU for a number t, float32 in t's shape for a
        tensor.

        Raises ValueError for a time outside 0…num_steps and TypeError for a tensor that holds no real numbers; times on
        a GPU are not looked at.
        """
        self._check(t)
        if isinstance(t, Tensor):
            return self._levels(_interpolated(self.log_alpha_bars, t))
        t = torch.tensor(t, dtype=torch.float64, device="cpu")
        return self._levels(_interpolated(self.exact_log_alpha_bars, t))

    def tabulated(self, times: Sequence[float]) -> dict[float, list[NoiseLevel]]:
        """Map each time of a run to its `noise_levels`, which are looked up together; errors as there."""
        t = torch.tensor(times, dtype=torch.float64, device="cpu")
        self._check(t)
        levels = self._levels(_interpolated(self.exact_log_alpha_bars, t))
        columns = [level.half_logsnr.unbind() for level in levels]
        return {time: [NoiseLevel(x) for x in row] for time, *row in zip(times, *columns, strict=True)}

    def _levels(self, log_alpha_bar: Tensor) -> list[NoiseLevel]:
        logsnr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        return [NoiseLevel((logsnr - shift) / 2) for shift in self.log_snr_shifts]

    def alpha_bars(self, t: Time) -> Tensor:
        """Give ᾱ_t of every level, float32 (levels, *t's shape) on the schedule's device; errors as `noise_levels`."""
        alpha_bars = torch.stack([torch.sigmoid(2 * level.half_logsnr) for level in self.noise_levels(t)])
        return alpha_bars.to(self.log_alpha_bars)

    def _check(self, t: Time) -> None:
        if not isinstance(t, Tensor):
            smallest = largest = t
        elif t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t is {t.dtype}; it must hold real numbers in 0…{self.num_steps}")
        elif t.is_floating_point() and t.dtype.itemsize < 4:
            raise TypeError(f"t is {t.dtype}, which rounds times; it must be float32, float64 or whole numbers")
        elif t.device.type != "cpu" or t.numel() == 0 or torch.compiler.is_compiling():
            return  # looking at values would stall a GPU's stream, and break a graph
        else:
            smallest, largest = t.min().item(), t.max().item()
        if not (smallest >= 0 and largest <= self.num_steps):
            raise ValueError(f"t is in {smallest}…{largest}; it must be in 0…{self.num_steps}")


def _interpolated(table: Tensor, t: Tensor) -> Tensor:
    """The table's values at the real indices t, linear between neighbours, in the table's dtype and t's shape."""
    before = t.floor().clamp(0, len(table) - 2).long()
    return torch.lerp(table[before], table[before + 1], (t - before).to(table.dtype))


def alpha_bar_table(schedule: str, num_steps: int) -> Tensor:
    """Give ᾱ_0 … ᾱ_num_steps, float64 (num_steps + 1,), falling from ᾱ_0 = 1; ᾱ_t = Π(1 − β) over the first t steps.

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
