"""GroupNormSiLU where one program takes a whole group of one row, and the gradients of the parameters.

A program walks its group twice, first to reduce it and then to transform it; the second time it reads from the cache,
so that memory is read once and written once. Of STAGES Triton makes one buffer fewer: of 2 only one, which prefetches
nothing and takes 1.1 to 1.4 times as long with the same tiles at a batch of 2 on an H100; a third buffer gains no more.
Groups too large for this, and large channels-last calls: tile_kernels.py.

x is (N, C, S), S the flattened spatial size, dense and either contiguous or channels-last; the two differ only in the
address of an element. The last C_SKIP of the C channels may lie in a second tensor of the same format, the skip, and a
group may have channels of both; y and dy are always one tensor.

Statistics never take E[x²] − E[x]². Everywhere a group is first shifted by its first element, the pilot, and `mean` is
the mean of what is left: x − pilot − mean is exact to the last bits even at 10000 ± 0.1, where the plain mean, rounded
to float32, would be off by 0.005 standard deviations.
"""

import triton
import triton.language as tl

STAGES = tl.constexpr(3)  # of the loops over a whole group


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
def reciprocal_root(x):
    """1/√x of a scalar, rounded: rsqrt errs by two units in the last place on a GPU, and a group shares the error."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def activated(u, SILU: tl.constexpr):
    if SILU:
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def activation_gradient(dy, u, SILU: tl.constexpr):
    """d(activated(u))/du · dy. Of a large u, 1 − sigmoid(u) as a difference would be nothing but rounding, times u; as
    exp(−u)·sigmoid(u) it is right, and no infinity times 0 as long as the exponential is finite."""
    if SILU:
        e = tl.exp(tl.minimum(-u, 60.0))
        sigmoid = 1.0 / (1.0 + e)
        dy = dy * sigmoid * (1.0 + u * (e * sigmoid))
    return dy


@triton.jit
def offsets(n, c, first_s, i, C, S, CHANNELS_LAST: tl.constexpr):
    """Of the positions first_s + i in the channels c of row n; n is int64, as there may be 2³¹ elements and more."""
    first = n * C * S + first_s * stride_s(C, CHANNELS_LAST)
    return first + (c.to(tl.int64) * stride_c(S, CHANNELS_LAST) + i * stride_s(C, CHANNELS_LAST))


@triton.jit
def elements(x_ptr, skip_ptr, n, c, first_s, i, C, C_SKIP, S, CHANNELS_LAST: tl.constexpr):
    """Pointers to the positions first_s + i in the channels c of row n: into x, but for the last C_SKIP of C channels
    into the skip, if there is one.

    The compiler sees that the choice is the same for as many channels as the largest power of two dividing the border
    and the first of c, and Triton 3.9 takes a pointer so chosen to be aligned to that many bytes, and no more: with 16,
    channels-last loads are as wide as without a skip. A choice between whole addresses, rather than between the
    channels' first ones, keeps the contiguous format's loads wide, too.
    """
    if skip_ptr is None:
        at = x_ptr + offsets(n, c, first_s, i, C, S, CHANNELS_LAST)
    else:
        C_X = C - C_SKIP
        in_x = x_ptr + offsets(n, c, first_s, i, C_X, S, CHANNELS_LAST)
        in_skip = skip_ptr + offsets(n, c - C_X, first_s, i, C_SKIP, S, CHANNELS_LAST)
        at = tl.where(c < C_X, in_x, in_skip)
    return at


@triton.jit
def group_position(skip_ptr, G, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of a program: group number n·G + g, row n, the group's first channel, the channels c of a tile [BLOCK_C, 1],
    which of them belong to the group, positions s [1, BLOCK_S] of the first tile. Neighbouring programs take
    neighbouring groups, which share the memory sectors of a channels-last row."""
    group = tl.program_id(0)
    n = (group // G).to(tl.int64)
    first_c = (group % G) * CHANNELS
    k = tl.arange(0, BLOCK_C)[:, None]
    c = first_c + k
    mine = k < CHANNELS
    if skip_ptr is not None and CHANNELS % 16 == 8 and CHANNELS < BLOCK_C:
        c = first_c // 16 * 16 + k  # from a multiple of 16 on, for the sake of `elements`; the group still fits
        mine = (c >= first_c) & (c < first_c + CHANNELS)
    return group, n, first_c, c, mine, tl.arange(0, BLOCK_S)[None, :]


@triton.jit
def group_forward(
    x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, mean, rstd of one group of one row."""
    C = G * CHANNELS
    group, n, first_c, c, mine, s = group_position(skip_ptr, G, CHANNELS, BLOCK_C, BLOCK_S)
    pilot_at = elements(x_ptr, skip_ptr, n, first_c, 0, 0, C, C_SKIP, S, CHANNELS_LAST)
    pilot = tl.load(pilot_at).to(tl.float32)

    means = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)  # Welford: running mean and Σ(x − mean)² of each place in the tile
    deviations = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        inside = mine & (start + s < S)
        x_at = elements(x_ptr, skip_ptr, n, c, start, s, C, C_SKIP, S, CHANNELS_LAST)
        x = tl.load(x_at, inside, other=0.0).to(tl.float32) - pilot
        difference = tl.where(inside, x - means, 0.0)
        means += difference * (1.0 / (start // BLOCK_S + 1))
        deviations += difference * (x - means)
    count = tl.cast(S, tl.float32) * CHANNELS
    counts = tl.where(mine, (S - s + BLOCK_S - 1) // BLOCK_S, 0).to(tl.float32)  # [BLOCK_C, BLOCK_S]
    mean = tl.div_rn(tl.sum(tl.sum(counts * means, 1), 0), count)
    deviations += counts * (means - mean) * (means - mean)
    rstd = reciprocal_root(tl.div_rn(tl.sum(tl.sum(deviations, 1), 0), count) + tl.cast(eps, tl.float32))

    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        inside = mine & (start + s < S)
        x_at = elements(x_ptr, skip_ptr, n, c, start, s, C, C_SKIP, S, CHANNELS_LAST)
        x = tl.load(x_at, inside, other=0.0).to(tl.float32) - pilot
        y = activated((x - mean) * (rstd * gain) + offset, SILU)
        y_at = y_ptr + offsets(n, c, start, s, C, S, CHANNELS_LAST)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), inside)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)


@triton.jit
def group_backward(
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
    pilot_at = elements(x_ptr, skip_ptr, n, first_c, 0, 0, C, C_SKIP, S, CHANNELS_LAST)
    pilot = tl.load(pilot_at).to(tl.float32)
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, mine
    )  # [BLOCK_C, 1]

    sum_du = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_du_xhat = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        inside = mine & (start + s < S)
        x_at = elements(x_ptr, skip_ptr, n, c, start, s, C, C_SKIP, S, CHANNELS_LAST)
        x = tl.load(x_at, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets(n, c, start, s, C, S, CHANNELS_LAST), inside, other=0.0).to(tl.float32)
        xhat = (x - pilot - mean) * rstd
        du = activation_gradient(dy, xhat * gain + offset, SILU)  # 0 outside, where dy is 0
        sum_du += du
        sum_du_xhat += du * xhat
    sum_du = tl.sum(sum_du, 1, keep_dims=True)  # [BLOCK_C, 1]
    sum_du_xhat = tl.sum(sum_du_xhat, 1, keep_dims=True)
    tl.store(sum_du_ptr + n * C + c, sum_du, mine)
    tl.store(sum_du_xhat_ptr + n * C + c, sum_du_xhat, mine)
    count = tl.cast(S, tl.float32) * CHANNELS
    mean_dz = tl.div_rn(rstd * tl.sum(tl.sum(gain * sum_du, 1), 0), count)  # dz = gain·du, and both means times rstd
    mean_dz_xhat = tl.div_rn(rstd * tl.sum(tl.sum(gain * sum_du_xhat, 1), 0), count)

    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        inside = mine & (start + s < S)
        x_at = elements(x_ptr, skip_ptr, n, c, start, s, C, C_SKIP, S, CHANNELS_LAST)
        x = tl.load(x_at, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets(n, c, start, s, C, S, CHANNELS_LAST), inside, other=0.0).to(tl.float32)
        xhat = (x - pilot - mean) * rstd
        du = activation_gradient(dy, xhat * gain + offset, SILU)
        dx = (rstd * gain) * du - mean_dz - xhat * mean_dz_xhat
        dx_at = elements(dx_ptr, dskip_ptr, n, c, start, s, C, C_SKIP, S, CHANNELS_LAST)
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), inside)


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
