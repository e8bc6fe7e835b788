"""GroupNormSiLU of groups that one program holds on chip: memory is read once and written once.

x is (N, C, S), S the flattened spatial size, dense and either contiguous or channels-last; the two differ only in the
address of an element. Statistics never take E[x²] − E[x]². Everywhere a group is first shifted by its first element,
the pilot, and `mean` is the mean of what is left: x − pilot − mean is exact to the last bits even at 10000 ± 0.1, where
the plain mean, rounded to float32, would be off by 0.005 standard deviations. Groups too large for a program: tiled.py.
"""

import triton
import triton.language as tl

RESIDENT_FORWARD = 32768  # elements of a group, padded to powers of two, that 16 warps hold in registers
RESIDENT_BACKWARD = 16384  # half of it: the backward holds x and dy


def resident_launch(groups: int, channels: int, positions: int, limit: int) -> dict | None:
    """Constants of a resident kernel for `groups` of `channels` × `positions`; None where these exceed `limit`."""
    block_c, block_s = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    if block_c * block_s > limit or channels * groups * positions >= 2**31:
        return None  # offsets inside a row are int32
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps(block_c * block_s)}


def affine_launch(rows: int, channels: int) -> tuple[dict, tuple[int]]:
    """Constants and grid of affine_gradients."""
    block_c = 32  # 128 bytes of float32
    block_n = min(triton.next_power_of_2(max(rows, 1)), 128)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}, (triton.cdiv(channels, block_c),)


def film_launch(film_rows: int, channels: int, frames: int) -> tuple[dict, tuple[int]]:
    """Constants and grid of film_gradients."""
    block_c = 128
    block_t = min(triton.next_power_of_2(max(frames, 1)), 16)
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4}, (film_rows * triton.cdiv(channels, block_c),)


def warps(elements: int) -> int:
    """Warps that give every thread about 32 elements."""
    return min(max(elements // 1024, 1), 16)


@triton.jit
def stride_c(S, CHANNELS_LAST: tl.constexpr):
    return 1 if CHANNELS_LAST else S


@triton.jit
def stride_s(C, CHANNELS_LAST: tl.constexpr):
    return C if CHANNELS_LAST else 1


@triton.jit
def channel_transform(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, film_row, c, mask):
    """gain, offset of the channels c, with x̂·gain + offset = (x̂·weight + bias)·(1 + scale) + shift."""
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + c, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        modulation = 1.0 + tl.load(scale_ptr + film_row * scale_stride + c, mask, other=0.0).to(tl.float32)
        gain *= modulation
        offset *= modulation
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + film_row * shift_stride + c, mask, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def activated(u, SILU: tl.constexpr):
    if SILU:
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def activation_gradient(dy, u, SILU: tl.constexpr):
    """d(activated(u))/du · dy."""
    if SILU:
        sigmoid = tl.sigmoid(u)
        dy = dy * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return dy


@triton.jit
def resident_forward(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, mean, rstd of one group of one row."""
    group = tl.program_id(0)  # n·G + g: neighbours share the memory sectors of a channels-last row
    n = (group // G).to(tl.int64)
    C = G * CHANNELS
    k = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    c = (group % G) * CHANNELS + k
    inside = (k < CHANNELS) & (s < S)
    first = n * C * S + (group % G) * CHANNELS * stride_c(S, CHANNELS_LAST)  # int64: x may hold 2³¹ elements
    at = k * stride_c(S, CHANNELS_LAST) + s * stride_s(C, CHANNELS_LAST)  # [BLOCK_C, BLOCK_S]
    pilot = tl.load(x_ptr + first).to(tl.float32)
    count = tl.cast(S, tl.float32) * CHANNELS

    x = tl.where(inside, tl.load(x_ptr + first + at, inside, other=0.0).to(tl.float32) - pilot, 0.0)
    mean = tl.sum(tl.sum(x, 1), 0) / count
    x = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / count + tl.cast(eps, tl.float32))
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, k < CHANNELS
    )  # [BLOCK_C, 1]
    y = activated(x * (rstd * gain) + offset, SILU)
    tl.store(y_ptr + first + at, y.to(y_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)


@triton.jit
def resident_backward(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, sum_du_ptr, sum_du_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one group of one row, and its channels' Σ du and Σ du·x̂; u is what the activation is applied to."""
    group = tl.program_id(0)
    n = (group // G).to(tl.int64)
    C = G * CHANNELS
    k = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    c = (group % G) * CHANNELS + k
    inside = (k < CHANNELS) & (s < S)
    first = n * C * S + (group % G) * CHANNELS * stride_c(S, CHANNELS_LAST)  # int64: x may hold 2³¹ elements
    at = k * stride_c(S, CHANNELS_LAST) + s * stride_s(C, CHANNELS_LAST)  # [BLOCK_C, BLOCK_S]
    count = tl.cast(S, tl.float32) * CHANNELS

    pilot = tl.load(x_ptr + first).to(tl.float32)
    rstd = tl.load(rstd_ptr + group)
    xhat = (tl.load(x_ptr + first + at, inside, other=0.0).to(tl.float32) - pilot - tl.load(mean_ptr + group)) * rstd
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, k < CHANNELS
    )  # [BLOCK_C, 1]
    du = tl.load(dy_ptr + first + at, inside, other=0.0).to(tl.float32)  # 0 outside, and so is every sum over it
    du = activation_gradient(du, xhat * gain + offset, SILU)
    sum_du = tl.sum(du, 1, keep_dims=True)  # [BLOCK_C, 1]
    sum_du_xhat = tl.sum(du * xhat, 1, keep_dims=True)
    tl.store(sum_du_ptr + n * C + c, sum_du, k < CHANNELS)
    tl.store(sum_du_xhat_ptr + n * C + c, sum_du_xhat, k < CHANNELS)
    mean_dz = tl.sum(tl.sum(gain * sum_du, 1), 0) / count
    mean_dz_xhat = tl.sum(tl.sum(gain * sum_du_xhat, 1), 0) / count
    dx = rstd * (gain * du - mean_dz - xhat * mean_dz_xhat)
    tl.store(dx_ptr + first + at, dx.to(dx_ptr.dtype.element_ty), inside)


@triton.jit
def affine_gradients(
    sum_du_ptr, sum_du_xhat_ptr, dweight_ptr, dbias_ptr, scale_ptr, scale_stride, N, C, frames,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight = Σₙ (1 + scale)·Σ du·x̂ and dbias = Σₙ (1 + scale)·Σ du of a block of channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        inside = (n < N) & (c < C)
        modulation = tl.full([BLOCK_N, BLOCK_C], 1.0, tl.float32)
        if scale_ptr is not None:
            modulation += tl.load(scale_ptr + n // frames * scale_stride + c, inside, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            dweight += modulation * tl.load(sum_du_xhat_ptr + n * C + c, inside, other=0.0)
        if dbias_ptr is not None:
            dbias += modulation * tl.load(sum_du_ptr + n * C + c, inside, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, tl.sum(dweight, 0, keep_dims=True).to(dweight_ptr.dtype.element_ty), c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, tl.sum(dbias, 0, keep_dims=True).to(dbias_ptr.dtype.element_ty), c < C)


@triton.jit
def film_gradients(
    sum_du_ptr, sum_du_xhat_ptr, dscale_ptr, dshift_ptr, weight_ptr, bias_ptr, C, frames,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dscale = Σ weight·Σ du·x̂ + bias·Σ du and dshift = Σ Σ du, over the x rows that one row of scale serves."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum_du = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    sum_du_xhat = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, frames, BLOCK_T):
        frame = start + tl.arange(0, BLOCK_T)[:, None]
        inside = (frame < frames) & (c < C)
        at = (row * frames + frame) * C + c
        sum_du += tl.load(sum_du_ptr + at, inside, other=0.0)
        sum_du_xhat += tl.load(sum_du_xhat_ptr + at, inside, other=0.0)
    sum_du = tl.sum(sum_du, 0, keep_dims=True)  # [1, BLOCK_C]
    sum_du_xhat = tl.sum(sum_du_xhat, 0, keep_dims=True)
    weight, bias = channel_transform(weight_ptr, bias_ptr, None, None, 0, 0, row, c, c < C)
    if dscale_ptr is not None:
        dscale = weight * sum_du_xhat + bias * sum_du
        tl.store(dscale_ptr + row * C + c, dscale.to(dscale_ptr.dtype.element_ty), c < C)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + row * C + c, sum_du.to(dshift_ptr.dtype.element_ty), c < C)
