"""GroupNormSiLU where one program holds a whole group of one row in registers.

The group is one tile: all its loads are on their way at once, and memory is read once, not a second time from the cache
as by kernels.py, whose conventions these are. A group that its warps' registers cannot hold spills to memory: the sums
of backward are written out here as they are there, since shared by a function they cost two registers too many.
"""

import triton
import triton.language as tl

from .kernels import (
    activated,
    activation_gradient,
    channel_transform,
    elements,
    group_position,
    offsets,
    reciprocal_root,
)


@triton.jit
def held_group_forward(
    x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, mean, rstd of one group of one row."""
    C = G * CHANNELS
    group, n, first_c, c, mine, s = group_position(skip_ptr, G, CHANNELS, BLOCK_C, BLOCK_S)
    inside = mine & (s < S)
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]
    x_at = elements(x_ptr, skip_ptr, n, c, 0, s, C, C_SKIP, S, CHANNELS_LAST)
    x = tl.load(x_at, inside, other=0.0)
    pilot_at = elements(x_ptr, skip_ptr, n, first_c, 0, 0, C, C_SKIP, S, CHANNELS_LAST)
    x = x.to(tl.float32) - tl.load(pilot_at).to(tl.float32)

    count = tl.cast(S, tl.float32) * CHANNELS
    mean = tl.div_rn(tl.sum(tl.sum(tl.where(inside, x, 0.0), 1), 0), count)
    difference = tl.where(inside, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(tl.sum(difference * difference, 1), 0), count)
    rstd = reciprocal_root(variance + tl.cast(eps, tl.float32))

    y = activated((x - mean) * (rstd * gain) + offset, SILU)
    tl.store(y_ptr + offsets(n, c, 0, s, C, S, CHANNELS_LAST), y.to(y_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)


@triton.jit
def held_group_backward(
    dy_ptr, x_ptr, skip_ptr, dx_ptr, dskip_ptr, mean_ptr, rstd_ptr, sum_du_ptr, sum_du_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx and dskip of one group of one row, and its channels' Σ du and Σ du·x̂; u is what the activation is applied
    to."""
    C = G * CHANNELS
    group, n, first_c, c, mine, s = group_position(skip_ptr, G, CHANNELS, BLOCK_C, BLOCK_S)
    inside = mine & (s < S)
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]
    x_at = elements(x_ptr, skip_ptr, n, c, 0, s, C, C_SKIP, S, CHANNELS_LAST)
    x = tl.load(x_at, inside, other=0.0)
    dy = tl.load(dy_ptr + offsets(n, c, 0, s, C, S, CHANNELS_LAST), inside, other=0.0)
    pilot_at = elements(x_ptr, skip_ptr, n, first_c, 0, 0, C, C_SKIP, S, CHANNELS_LAST)
    pilot = tl.load(pilot_at).to(tl.float32)
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)

    xhat = (x.to(tl.float32) - pilot - mean) * rstd
    du = activation_gradient(dy.to(tl.float32), xhat * gain + offset, SILU)  # 0 outside, where dy is 0
    sum_du = tl.sum(du, 1, keep_dims=True)  # [BLOCK_C, 1]
    sum_du_xhat = tl.sum(du * xhat, 1, keep_dims=True)
    tl.store(sum_du_ptr + n * C + c, sum_du, mine)
    tl.store(sum_du_xhat_ptr + n * C + c, sum_du_xhat, mine)
    count = tl.cast(S, tl.float32) * CHANNELS
    mean_dz = tl.div_rn(rstd * tl.sum(tl.sum(gain * sum_du, 1), 0), count)  # dz = gain·du, and both means times rstd
    mean_dz_xhat = tl.div_rn(rstd * tl.sum(tl.sum(gain * sum_du_xhat, 1), 0), count)

    dx = (rstd * gain) * du - mean_dz - xhat * mean_dz_xhat
    dx_at = elements(dx_ptr, dskip_ptr, n, c, 0, s, C, C_SKIP, S, CHANNELS_LAST)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), inside)
