"""Classifier-free guidance: a network asked twice, with the context and with another or none, and pushed apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mdm_models.diffusion.objective import at_least_float32


@dataclass(frozen=True)
class Condition:
    """What the network is told besides x and the time; every tensor with one row a sample."""

    context: Tensor | None  # (B, S, D)
    context_mask: Tensor | None  # (B, S), True = a token
    micro: dict[str, Tensor] | None  # name → (B,)

    def beside(self, negative_context: Tensor | None, negative_mask: Tensor | None) -> "Condition":
        """Make one doubled batch, [negative, this one]; a single mask missing means that all its tokens count."""
        context, mask = self.context, self.context_mask
        if context is None or negative_context is None:
            raise ValueError("guidance_scale other than 1 needs both context and negative_context")
        if context.shape != negative_context.shape:
            raise ValueError(
                f"negative_context has shape {tuple(negative_context.shape)}; it must be context's, "
                f"{tuple(context.shape)}"
            )
        masks = None
        if mask is not None or negative_mask is not None:
            everything = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
            masks = torch.cat([everything if m is None else m.to(torch.bool) for m in (negative_mask, mask)])
        micro = self.micro and {name: torch.cat([value, value]) for name, value in self.micro.items()}
        return Condition(torch.cat([negative_context, context]), masks, micro)


@dataclass(frozen=True)
class GuidedModel:
    """Gives a prediction a level for (x_t, t), under guidance while t is in the interval.

    Outside the interval, and everywhere if `doubled` is None, the model sees `condition` alone: half the work. At high
    noise guidance costs variety, at low noise it does little (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
    Interval"). A model with a method `prepare` is asked once what it makes of either condition alone, and is then given
    that in the condition's place.
    """

    model: Callable[..., list[Tensor]]  # (x, time, context, context_mask, micro) → predictions
    condition: Condition
    doubled: Condition | None
    scales: Sequence[float]  # one a level
    interval: tuple[float, float]

    def __call__(self, x: list[Tensor], t: float) -> list[Tensor]:
        if not self.interval[0] <= t <= self.interval[1] or (beside := self._beside) is None:
            return self._predictions(x, t, self._alone)
        return guide(self._predictions([torch.cat([y, y]) for y in x], t, beside), self.scales)

    @cached_property
    def _alone(self) -> tuple:
        return self._prepared(self.condition)

    @cached_property
    def _beside(self) -> tuple | None:
        return None if self.doubled is None else self._prepared(self.doubled)

    def _prepared(self, condition: Condition) -> tuple:
        """What the model takes after x and the time."""
        given = condition.context, condition.context_mask, condition.micro
        prepare = getattr(self.model, "prepare", None)
        return given if prepare is None else (prepare(*given),)

    def _predictions(self, x: list[Tensor], t: float, condition: tuple) -> list[Tensor]:
        dtype = torch.int64 if isinstance(t, int) else x[0].dtype
        time = torch.full((x[0].shape[0],), t - 1, dtype=dtype, device=x[0].device)
        return self.model(x, time, *condition)


def guide(preds: Sequence[Tensor], guidance_scale: float | Sequence[float]) -> list[Tensor]:
    """Guide every level by u + guidance_scale·(c − u) (Ho & Salimans 2022), in at least float32; (2B, …) → (B, …).

    preds hold u's half, then c's; guidance_scale is one number or one a level.
    """
    scales = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale] * len(preds)
    halves = [at_least_float32(pred).chunk(2) for pred in preds]
    return [torch.lerp(u, c, scale) for (u, c), scale in zip(halves, scales, strict=True)]
