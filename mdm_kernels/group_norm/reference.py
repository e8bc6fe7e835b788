"""The definition of group_norm_silu, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """As `mdm_kernels.group_norm_silu`; computes in float32 (float64 for float64), returns x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(dtype).reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    y = ((grouped - mean) * (variance + eps).rsqrt()).reshape(x.shape)

    def per_channel(parameter: Tensor) -> Tensor:
        """(C,) or (N / T, C) → (1 or N, C, 1, …)"""
        parameter = parameter.to(dtype).reshape(-1, x.shape[1])
        if parameter.shape[0] > 1:
            parameter = parameter.repeat_interleave(x.shape[0] // parameter.shape[0], 0)
        return parameter.reshape(*parameter.shape, *[1] * (x.dim() - 2))

    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
