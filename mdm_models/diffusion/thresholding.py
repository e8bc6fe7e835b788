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
    bound = torch.stack([torch.quantile(sample.abs().flatten(), quantile) for sample in x_0]).clamp(1, largest)
    bound = bound.view(-1, *[1] * (x_0.dim() - 1))
    return x_0.clamp(-bound, bound) / bound
