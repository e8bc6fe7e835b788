"""Holding predicted images inside ±1, which guidance pushes them out of."""

import torch
from torch import Tensor

BOUNDS = {  # name → quantile of |x_0| that becomes the clipping bound, and the bound's largest value
    "dynamic": (0.995, 100.0),
    "dynamic_if": (0.95, 1.5),
}


def thresholded(x_0: Tensor, threshold: str) -> Tensor:
    """Hold x_0 (B, …) in its range, in its dtype, by one of these rules:

    "clip" to ±1; "dynamic", clip to the 0.995 quantile of |x_0| over a whole image or clip, held in 1…100, and divide
    by it; "dynamic_if", the same with the 0.95 quantile in 1…1.5 (Saharia et al. 2022, section 2.3); "none".
    """
    if threshold == "none":
        return x_0
    if threshold == "clip":
        return x_0.clamp(-1, 1)
    if threshold not in BOUNDS:
        raise ValueError(f"threshold is {threshold!r}; it must be one of clip, {', '.join(BOUNDS)}, none")
    quantile, largest = BOUNDS[threshold]
    bound = _quantile(x_0.abs().flatten(1), quantile).clamp(1, largest)
    bound = bound.view(-1, *[1] * (x_0.dim() - 1))
    return x_0.clamp(-bound, bound) / bound


def _quantile(x: Tensor, q: float) -> Tensor:
    """The high quantile q < 1 of each row, linear between neighbours: (B, n) → (B,).

    torch.quantile sorts all of a row and, in torch 2.11, takes none of more than 2²⁴ numbers, 85 frames of 256².
    """
    place = q * (x.shape[1] - 1)
    tail = x.topk(x.shape[1] - int(place)).values  # falling, to the number below the quantile
    below, above = tail[:, -1], tail[:, -2:][:, 0]  # the same number if there is no other
    return torch.lerp(below, above, place % 1)
