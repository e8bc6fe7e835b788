"""The definition of group_norm_silu, in plain PyTorch: the oracle, and what runs where no kernel and not cpu.py does.

torch's own group norm is fast in its forward pass, but on a CPU inexact where a group's mean is many standard
deviations from zero: at 10000 ± 0.1 in float32 it errs by 0.02 standard deviations (contiguous: it evaluates
x·a − mean·a) or by 1000 (channels-last: E[x²] − E[x]²). It is exact once the mean is near zero. So it gets x minus the
mean of each group, which changes neither the result nor, the mean being a constant to autograd, any gradient.

Its channels-last sums are one running total, which loses digits as a group grows: at 1024² with one channel a group,
2e-4 of the result. The largest groups are therefore normalised step by step, with torch's pairwise means.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import CHANNELS_LAST, concatenated, dense, is_channels_last
from ..private_torch import is_fake, torch_func_is_active

CENTRED = 16
"""|mean| in standard deviations up to which torch's float32 sums leave the last bit of a half-precision result right"""

SMALL = 2**15
"""elements of the rows that share a modulation up to which normalising all of them in one call, and modulating the
result, is faster than a call for each: while it all stays in a CPU's cache"""

RUNNING_TOTAL = 2**16
"""elements of a channels-last group up to which one running float32 total errs by a millionth or two"""


def normalised(x: Tensor, num_groups: int, gain: Tensor, offset: Tensor, eps: float, activation: str | None) -> Tensor:
    """Compute act(x̂·gain + offset), x̂ the normalised x; gain and offset (1 or N / T, C) as `_channel_transform`
    gives them."""
    film_rows = gain.shape[0]
    frames = x.shape[0] // film_rows
    if film_rows == 1:
        y = _group_norm(x, num_groups, gain[0], offset[0], eps)
    elif _is_traced(x) or x[:frames].numel() <= SMALL:  # a graph with a call for each row would be one for this batch
        y = _modulated(_group_norm(x.to(gain.dtype), num_groups, None, None, eps), gain, offset, frames)
    else:
        y = [
            _group_norm(rows, num_groups, row_gain, row_offset, eps)
            for rows, row_gain, row_offset in zip(x.split(frames), gain, offset, strict=True)
        ]
        y = torch.cat(y)
    y = dense(y, is_channels_last(x))  # on CUDA, torch's group norm may answer contiguous for channels last
    if activation == "silu":
        y = F.silu(y, inplace=not torch.is_grad_enabled())
    return y.to(x.dtype)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    normalise: Callable[..., Tensor] = normalised,
) -> Tensor:
    """Compute `mdm_kernels.group_norm_silu` in float32 (float64 for float64); the result has x's dtype.

    normalise: what computes `normalised`, perhaps in a way of its own.
    """
    if skip is not None:
        x = concatenated(x, skip)
    gain, offset = _channel_transform(x, weight, bias, scale, shift)
    if x.numel() == 0:
        return x * gain.sum().to(x.dtype) + offset.sum().to(x.dtype)  # as empty, and every gradient is zero
    return normalise(x, num_groups, gain, offset, eps, activation)


def _channel_transform(x: Tensor, weight, bias, scale, shift) -> tuple[Tensor, Tensor]:
    """Give gain and offset (1 or N / T, C), in float32 or float64, with which act(x̂·gain + offset) is the result."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gain, offset = x.new_ones(1, x.shape[1], dtype=dtype), x.new_zeros(1, x.shape[1], dtype=dtype)
    if weight is not None:
        gain = gain * weight.to(dtype)
    if bias is not None:
        offset = offset + bias.to(dtype)
    if scale is not None:
        modulation = 1 + scale.to(dtype)
        gain, offset = gain * modulation, offset * modulation
    if shift is not None:
        offset = offset + shift.to(dtype)
    return torch.broadcast_tensors(gain, offset)


def _modulated(x: Tensor, gain: Tensor, offset: Tensor, frames: int) -> Tensor:
    """x·gain + offset, each row of gain and offset (N / frames, C) serving so many rows of x in turn."""
    gain, offset = (
        each[:, None].expand(-1, frames, -1).reshape(-1, x.shape[1], *[1] * (x.dim() - 2)) for each in (gain, offset)
    )
    return torch.addcmul(offset, x, gain)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.group_norm, exact for any mean; weight, bias (C,) in float32 or float64, in which the result may come."""
    rows, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    dtype = x.dtype if weight is None else weight.dtype
    long_sums = is_channels_last(x) and positions * channels // num_groups > RUNNING_TOTAL
    if x.dtype != dtype and _holds_cpu_data(x):
        known = dense(x, x.dim() in CHANNELS_LAST and is_channels_last(x))  # torch 2.11 takes no other format
        y, mean, rstd = torch.native_group_norm(known, weight, bias, rows, channels, positions, num_groups, eps)
        if not (mean.abs() * rstd > CENTRED).any():
            return y
    x = x.to(dtype)
    if long_sums:
        centred = x - _group_means(x, num_groups)
        left = _group_means(centred, num_groups)  # by the rounding of a mean far from zero
        variance = _group_means(centred.square(), num_groups) - left.square()
        rstd = torch.rsqrt(variance.clamp_min(0) + eps)
        if weight is None or bias is None:
            return (centred - left) * rstd
        ones = [1] * (x.dim() - 2)
        slope = rstd * weight.view(-1, *ones)
        return torch.addcmul(bias.view(-1, *ones) - left * slope, centred, slope)
    with torch.no_grad():
        mean = _group_means(x, num_groups)
    return torch.group_norm(x - mean, num_groups, weight, bias, eps)  # F.group_norm refuses one value a group


def _group_means(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, *spatial) → (N, C, 1, ...), each channel's entry the mean of its group."""
    rows, channels = x.shape[:2]
    means = x.reshape(rows, channels, -1).mean(-1).view(rows, num_groups, -1).mean(-1)
    return means.repeat_interleave(channels // num_groups, 1).view(rows, channels, *[1] * (x.dim() - 2))


def _holds_cpu_data(x: Tensor) -> bool:
    """Whether a decision may depend on x's values: not on another device, nor while shapes or graphs are traced."""
    return x.device.type == "cpu" and not _is_traced(x)


def _is_traced(x: Tensor) -> bool:
    return is_fake(x) or torch_func_is_active() or torch.compiler.is_compiling()
