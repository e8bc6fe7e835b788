"""What the ops are meant to reach on a GPU, and whether a measured row does."""

from dataclasses import dataclass

from benchmarks.contenders import COMPILED, OURS, PYTORCH, SDPA
from benchmarks.measure import KernelRow

COPY_RATE = "the copy rate"
FASTEST_SDPA = "the fastest SDPA"


@dataclass(frozen=True)
class Target:
    """A target for ours: to be at least so many times as fast as `rival`; of COPY_RATE, at least that share of it."""

    op: str
    """how the op's name begins"""
    rival: str
    at_least: float
    tensor_bytes: int = 0
    """only where the largest input has so many"""


TARGETS = (
    Target("group_norm_silu", COPY_RATE, 0.85, tensor_bytes=32_000_000),
    Target("group_norm_silu", PYTORCH, 3.0),
    Target("group_norm_silu", COMPILED, 1.2),
    Target("self_cross_attention", FASTEST_SDPA, 1.3),
    Target("flash_attention", FASTEST_SDPA, 1.0),
    Target("temporal_attention", FASTEST_SDPA, 2.0),
    Target("multires", PYTORCH, 5.0),
    Target("multires", COPY_RATE, 0.8),
)


@dataclass(frozen=True)
class Verdict:
    """How far a target was reached: times as fast as the rival, or the share of the copy rate."""

    target: Target
    reached: float | None
    """None if ours or the rival did not run"""

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached >= self.target.at_least

    def __str__(self) -> str:
        of_rate = self.target.rival == COPY_RATE
        wanted = f"≥ {100 * self.target.at_least:.0f} % of" if of_rate else f"≥ {self.target.at_least}×"
        if self.reached is None:
            return f"{wanted} {self.target.rival}: not measured"
        reached = f"{100 * self.reached:.0f} %" if of_rate else f"{self.reached:.2f}×"
        return f"{wanted} {self.target.rival}: {reached}, {'met' if self.met else '**missed**'}"


def verdicts(row: KernelRow) -> list[Verdict]:
    """Judge a row by each of the TARGETS that are for its op and its size."""
    return [
        Verdict(target, _reached(row, target.rival))
        for target in TARGETS
        if row.op.startswith(target.op) and row.largest_tensor >= target.tensor_bytes
    ]


def _reached(row: KernelRow, rival: str) -> float | None:
    ours = row.seconds(OURS)
    if rival == COPY_RATE:
        time = row.floor
    elif rival == FASTEST_SDPA:
        times = [seconds for name, seconds in row.rivals().items() if name == PYTORCH or name.startswith(SDPA)]
        time = min(times, default=None)
    else:
        time = row.seconds(rival)
    return None if ours is None or time is None else time / ours
