"""GroupNormSiLU where one program takes a whole group of one row, and the gradients of the parameters.

A program walks its group twice, first to reduce it and then to transform it; the second time it reads from the cache,
so that memory is read once and written once. Loops prefetch their next tile (num_stages=2), as few programs fit on a
multiprocessor. Groups too large for all this: tiled.py.

x is (N, C, S), S the flattened spatial size, dense and either contiguous or channels-last; the two differ only in the
address of an element. Statistics never take E[x²] − E[x]². Everywhere a group is first shifted by its first element,
the pilot, and `mean` is the mean of what is left: x − pilot − mean is exact to the last bits even at 10000 ± 0.1, where
the plain mean, rounded to float32, would be off by 0.005 standard deviations.
"""

import triton
import triton.language as tl

WHOLE_GROUP_BYTES = 128 * 1024  # of x; all groups in flight then fit a cache of 40 MB, in backward with those of dy
SMALL_GROUP = 8192  # elements for which one launch beats three, however few bytes of a group lie side by side


def whole_group_launch(groups: int, positions: int, itemsize: int, CHANNELS: int, CHANNELS_LAST: bool) -> dict | None:
    """Constants of the kernels that take a whole group of CHANNELS × `positions`; None where tiles are better."""
    block_c, block_s = triton.next_power_of_2(CHANNELS), triton.next_power_of_2(positions)
    narrow = CHANNELS_LAST and CHANNELS * itemsize < 16 and CHANNELS * positions > SMALL_GROUP
    too_large = CHANNELS * positions * itemsize > WHOLE_GROUP_BYTES or groups * CHANNELS * positions >= 2**31
    if narrow or too_large or block_c > 1024:
        return None
    warp_tile = 32 * 8  # a thread holds 8 elements: a 16-byte load in half precision, two in float32
    num_warps = min(max(block_c * block_s // warp_tile, 1), 16)
    block_s = min(block_s, max(num_warps * warp_tile // block_c, 1))
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": num_warps}


def affine_launch(rows: int, channels: int) -> tuple[dict, tuple[int]]:
    """Constants and grid of affine_gradients."""
    block_c = 32  # 128 bytes of float32
    block_n = min(triton.next_power_of_2(max(rows, 1)), 128)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4}, (triton.cdiv(channels, block_c),)


def film_launch(film_rows: int, channels: int, frames: int) -> tuple[dict, tuple[int]]:
    """Constants and grid of film_gradients."""
    block_c = 128
    block_t = min(triton.next_power_of_2(max(frames, 1)), 8)
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4}, (film_rows * triton.cdiv(channels, block_c),)


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
def group_position(
    G, S, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Of a program: group number n·G + g, row n, offset of the group's first element (int64: x may hold 2³¹ elements),
    offsets of a tile from there [BLOCK_C, BLOCK_S], channels c, which of them belong to the group, positions s.
    Neighbouring programs take neighbouring groups, which share the memory sectors of a channels-last row."""
    group = tl.program_id(0)
    n = (group // G).to(tl.int64)
    C = G * CHANNELS
    k = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    first_c = (group % G) * CHANNELS
    first = n * C * S + first_c * stride_c(S, CHANNELS_LAST)
    at = k * stride_c(S, CHANNELS_LAST) + s * stride_s(C, CHANNELS_LAST)
    return group, n, first, at, first_c + k, k < CHANNELS, s


@triton.jit
def group_forward(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, mean, rstd of one group of one row."""
    group, n, first, at, c, mine, s = group_position(G, S, CHANNELS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
    step = stride_s(G * CHANNELS, CHANNELS_LAST)
    pilot = tl.load(x_ptr + first).to(tl.float32)

    means = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)  # Welford: running mean and Σ(x − mean)² of each place in the tile
    deviations = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=2):
        inside = mine & (start + s < S)
        x = tl.load(x_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32) - pilot
        difference = tl.where(inside, x - means, 0.0)
        means += difference * (1.0 / (start // BLOCK_S + 1))
        deviations += difference * (x - means)
    count = tl.cast(S, tl.float32) * CHANNELS
    counts = tl.where(mine, (S - s + BLOCK_S - 1) // BLOCK_S, 0).to(tl.float32)  # [BLOCK_C, BLOCK_S]
    mean = tl.sum(tl.sum(counts * means, 1), 0) / count
    deviations += counts * (means - mean) * (means - mean)
    rstd = tl.rsqrt(tl.sum(tl.sum(deviations, 1), 0) / count + tl.cast(eps, tl.float32))

    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]
    for start in tl.range(0, S, BLOCK_S, num_stages=2):
        inside = mine & (start + s < S)
        x = tl.load(x_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32) - pilot
        y = activated((x - mean) * (rstd * gain) + offset, SILU)
        tl.store(y_ptr + first + (at + start * step), y.to(y_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)


@triton.jit
def group_backward(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, sum_du_ptr, sum_du_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of one group of one row, and its channels' Σ du and Σ du·x̂; u is what the activation is applied to."""
    group, n, first, at, c, mine, s = group_position(G, S, CHANNELS, BLOCK_C, BLOCK_S, CHANNELS_LAST)
    step = stride_s(G * CHANNELS, CHANNELS_LAST)
    pilot = tl.load(x_ptr + first).to(tl.float32)
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]

    sum_du = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_du_xhat = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=2):
        inside = mine & (start + s < S)
        x = tl.load(x_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32)
        xhat = (x - pilot - mean) * rstd
        du = activation_gradient(dy, xhat * gain + offset, SILU)  # 0 outside, where dy is 0
        sum_du += du
        sum_du_xhat += du * xhat
    sum_du = tl.sum(sum_du, 1, keep_dims=True)  # [BLOCK_C, 1]
    sum_du_xhat = tl.sum(sum_du_xhat, 1, keep_dims=True)
    tl.store(sum_du_ptr + n * G * CHANNELS + c, sum_du, mine)
    tl.store(sum_du_xhat_ptr + n * G * CHANNELS + c, sum_du_xhat, mine)
    count = tl.cast(S, tl.float32) * CHANNELS
    mean_dz = rstd * tl.sum(tl.sum(gain * sum_du, 1), 0) / count  # dz = gain·du, and both means times rstd
    mean_dz_xhat = rstd * tl.sum(tl.sum(gain * sum_du_xhat, 1), 0) / count

    for start in tl.range(0, S, BLOCK_S, num_stages=2):
        inside = mine & (start + s < S)
        x = tl.load(x_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + first + (at + start * step), inside, other=0.0).to(tl.float32)
        xhat = (x - pilot - mean) * rstd
        du = activation_gradient(dy, xhat * gain + offset, SILU)
        dx = (rstd * gain) * du - mean_dz - xhat * mean_dz_xhat
        tl.store(dx_ptr + first + (at + start * step), dx.to(dx_ptr.dtype.element_ty), inside)


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
