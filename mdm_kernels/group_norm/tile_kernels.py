"""GroupNormSiLU by tiles: of groups too large for one program, and of channels-last calls on much memory.

Forward: reduce tiles to per-channel partial results (tile_statistics), combine those of a group (combine_statistics),
transform the tiles (apply_forward). Backward: tile_gradient_sums, combine_gradient_sums, apply_backward. A tile is
[BLOCK_C, BLOCK_S] of one row and pays no heed to the borders of groups, so that channels-last loads are 16 bytes wide
whatever the channels per group. Partial results (N, tiles, C), two in float32, are written once and read once; of a
bfloat16 x each is 1/16 at channels-last tiles of 128 channels × 32 positions, 1/64 at 32 × 128: what L2 should hold.

x is read twice, and in backward dy too. The second time goes backwards, so that what was read last the first time is
still in the cache: up to 40 MB on an A100 and 50 MB on an H100 less than these MB, which bfloat16 rows of the models
move at batch 1 (256 + 128: of a skip), and in proportion at other widths and batches:

    channels   positions   forward: least   by tiles   backward: least   by tiles
    128        128²                   8.4       12.6              12.6       21.0
    512 + 256  64²                   12.6       18.9              18.9       31.5
    64         256²                  16.8       25.2              25.2       41.9
    256 + 128  128²                  25.2       37.7              37.7       62.9
    32         512²                  33.6       50.3              50.3       83.9
    128 + 64   256²                  50.3       75.5              75.5      125.8
    32         1024²                134.2      201.3             201.3      335.5
    32 + 32    1024²                268.4      402.7             402.7      671.1

A group that is one program's work (kernels.py) moves the least: in 256 channels × 64², 512 × 32², 768 × 16², and with a
skip up to 256 + 256 × 64². Moving the least is not being fastest: on an H100 tiles take 0.44 to 0.83 of the time that
the same groups took there in channels_last at batch 64, forward and backward, since many small programs keep more loads
on the way than few large ones (benchmarks/NOTES.md). So large channels-last calls come here whatever their groups.
"""

import triton
import triton.language as tl

from .kernels import activated, activation_gradient, channel_transform, elements, offsets, reciprocal_root


@triton.jit
def tile_position(program, C, S, tiles, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Row n, tile number, channels c [BLOCK_C, 1], first position and the others from there, i [1, BLOCK_S], of a
    program, and which elements are inside the row [BLOCK_C, BLOCK_S]; channels vary fastest."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    tile = ((program // channel_blocks) % tiles).to(tl.int64)
    n = (program // (channel_blocks * tiles)).to(tl.int64)
    c, first_s, i, inside = tile_elements(program % channel_blocks, tile, C, S, BLOCK_C, BLOCK_S)
    return n, tile, c, first_s, i, inside


@triton.jit
def tile_elements(block, tile, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of a block of channels and a tile of positions: c, first_s, i and inside, as of `tile_position`."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    first_s = tile * BLOCK_S
    i = tl.arange(0, BLOCK_S)[None, :]
    return c, first_s, i, (c < C) & (first_s + i < S)


@triton.jit
def less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """A tile of x and the skip minus its groups' pilots, [BLOCK_C, BLOCK_S] in float32; anything outside the row."""
    first_c = tl.minimum(c, C - 1) // CHANNELS * CHANNELS  # [BLOCK_C, 1]
    pilot_at = elements(x_ptr, skip_ptr, n, first_c, 0, 0, C, C_SKIP, S, CHANNELS_LAST)
    return x.to(tl.float32) - tl.load(pilot_at).to(tl.float32)


@triton.jit
def load_shifted(
    x_ptr, skip_ptr, n, c, first_s, i, inside, C, C_SKIP, S, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """`less_pilots` of the tile in memory."""
    x = tl.load(elements(x_ptr, skip_ptr, n, c, first_s, i, C, C_SKIP, S, CHANNELS_LAST), inside, other=0.0)
    return less_pilots(x, x_ptr, skip_ptr, n, c, C, C_SKIP, S, CHANNELS, CHANNELS_LAST)


@triton.jit
def channel_statistics(x, inside, tile, S, BLOCK_S: tl.constexpr):
    """Mean and Σ(x − mean)² of every channel of a tile, [BLOCK_C, 1]."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1, keep_dims=True) / tl.minimum(S - tile * BLOCK_S, BLOCK_S).to(tl.float32)
    x = tl.where(inside, x - mean, 0.0)
    return mean, tl.sum(x * x, 1, keep_dims=True)


@triton.jit
def tile_statistics(
    x_ptr, skip_ptr, means_ptr, deviations_ptr, G, S, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean (less its group's pilot) and Σ(x − mean)² of every channel of one tile, into (N, tiles, C)."""
    C = G * CHANNELS
    n, tile, c, first_s, i, inside = tile_position(tl.program_id(0), C, S, tiles, BLOCK_C, BLOCK_S)
    x = load_shifted(x_ptr, skip_ptr, n, c, first_s, i, inside, C, C_SKIP, S, CHANNELS, CHANNELS_LAST)
    mean, deviation = channel_statistics(x, inside, tile, S, BLOCK_S)
    out = (n * tiles + tile) * C + c
    tl.store(means_ptr + out, mean, c < C)
    tl.store(deviations_ptr + out, deviation, c < C)


@triton.jit
def combine_statistics(
    means_ptr, deviations_ptr, mean_ptr, rstd_ptr, G, S, tiles, eps,
    CHANNELS: tl.constexpr, TILE_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group of one row from the statistics of its channels' tiles."""
    combine_group_statistics(
        tl.program_id(0), means_ptr, deviations_ptr, mean_ptr, rstd_ptr, G, S, tiles, eps, CHANNELS, TILE_S, BLOCK
    )


@triton.jit
def combine_group_statistics(
    group, means_ptr, deviations_ptr, mean_ptr, rstd_ptr, G, S, tiles, eps,
    CHANNELS: tl.constexpr, TILE_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`combine_statistics` of the group numbered n·G + g."""
    C = G * CHANNELS
    row = (group // G).to(tl.int64) * tiles * C + (group % G) * CHANNELS
    count = tl.cast(S, tl.float32) * CHANNELS
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles * CHANNELS, BLOCK):
        i = start + tl.arange(0, BLOCK)  # a tile of the group and a channel of it
        tile, inside = (i // CHANNELS).to(tl.int64), i < tiles * CHANNELS
        mean = tl.load(means_ptr + row + tile * C + i % CHANNELS, inside, other=0.0)
        elements = tl.minimum(S - tile * TILE_S, TILE_S).to(tl.float32)
        total += tl.where(inside, mean * elements, 0.0)
    group_mean = tl.div_rn(tl.sum(total, 0), count)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles * CHANNELS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile, inside = (i // CHANNELS).to(tl.int64), i < tiles * CHANNELS
        at = row + tile * C + i % CHANNELS
        difference = tl.load(means_ptr + at, inside, other=0.0) - group_mean
        elements = tl.minimum(S - tile * TILE_S, TILE_S).to(tl.float32)
        deviation = tl.load(deviations_ptr + at, inside, other=0.0) + elements * difference * difference
        total += tl.where(inside, deviation, 0.0)
    tl.store(mean_ptr + group, group_mean)
    tl.store(rstd_ptr + group, reciprocal_root(tl.div_rn(tl.sum(total, 0), count) + tl.cast(eps, tl.float32)))


@triton.jit
def apply_forward(
    x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of one tile."""
    C = G * CHANNELS
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # last tiles first: the reduction left them in the cache
    n, _, c, first_s, i, inside = tile_position(program, C, S, tiles, BLOCK_C, BLOCK_S)
    x = load_shifted(x_ptr, skip_ptr, n, c, first_s, i, inside, C, C_SKIP, S, CHANNELS, CHANNELS_LAST)
    store_transformed(
        x, y_ptr, mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, first_s, i, inside, G, S, frames, CHANNELS, CHANNELS_LAST, SILU,
    )  # fmt: skip


@triton.jit
def store_transformed(
    x, y_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    n, c, first_s, i, inside, G, S, frames,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of a tile of which x, less the pilots, is there."""
    C = G * CHANNELS
    group = n * G + c // CHANNELS  # [BLOCK_C, 1]
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, c < C
    )
    x -= tl.load(mean_ptr + group, c < C, other=0.0)
    y = activated(x * (tl.load(rstd_ptr + group, c < C, other=0.0) * gain) + offset, SILU)
    y_at = y_ptr + offsets(n, c, first_s, i, C, S, CHANNELS_LAST)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def tile_gradients(
    dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    n, c, first_s, i, inside, G, S, frames, C_SKIP,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """`gradients` of the tile in memory."""
    C = G * CHANNELS
    x = load_shifted(x_ptr, skip_ptr, n, c, first_s, i, inside, C, C_SKIP, S, CHANNELS, CHANNELS_LAST)
    dy = tl.load(dy_ptr + offsets(n, c, first_s, i, C, S, CHANNELS_LAST), inside, other=0.0)
    return gradients(
        dy, x, mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, G, frames, CHANNELS, SILU,
    )  # fmt: skip


@triton.jit
def gradients(
    dy, x, mean_ptr, rstd_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    n, c, G, frames, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """du and x̂ of a tile [BLOCK_C, BLOCK_S] from dy and from x less the pilots; rstd and gain of its channels
    [BLOCK_C, 1]."""
    C = G * CHANNELS
    group = n * G + c // CHANNELS
    gain, offset = channel_transform(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n // frames, c, c < C
    )
    rstd = tl.load(rstd_ptr + group, c < C, other=0.0)
    mean = tl.load(mean_ptr + group, c < C, other=0.0)
    xhat = (x - mean) * rstd
    return activation_gradient(dy.to(tl.float32), xhat * gain + offset, SILU), xhat, rstd, gain


@triton.jit
def tile_gradient_sums(
    dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr, sums_du_ptr, sums_du_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Σ du and Σ du·x̂ of every channel of one tile, into (N, tiles, C)."""
    C = G * CHANNELS
    n, tile, c, first_s, i, inside = tile_position(tl.program_id(0), C, S, tiles, BLOCK_C, BLOCK_S)
    du, xhat, _, _ = tile_gradients(
        dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, first_s, i, inside, G, S, frames, C_SKIP, CHANNELS, CHANNELS_LAST, SILU,
    )  # fmt: skip
    out = (n * tiles + tile) * C + c
    tl.store(sums_du_ptr + out, tl.sum(du, 1, keep_dims=True), c < C)
    tl.store(sums_du_xhat_ptr + out, tl.sum(du * xhat, 1, keep_dims=True), c < C)


@triton.jit
def combine_gradient_sums(
    sums_du_ptr, sums_du_xhat_ptr, sum_du_ptr, sum_du_xhat_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    weight_ptr, scale_ptr, scale_stride, G, S, frames, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles: Σ du and Σ du·x̂ of each channel of one group of one row, and the group's mean of
    dz = gain·du and of dz·x̂."""
    combine_group_gradient_sums(
        tl.program_id(0),
        sums_du_ptr, sums_du_xhat_ptr, sum_du_ptr, sum_du_xhat_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
        weight_ptr, scale_ptr, scale_stride, G, S, frames, tiles, CHANNELS, BLOCK_C, BLOCK_T,
    )  # fmt: skip


@triton.jit
def combine_group_gradient_sums(
    group, sums_du_ptr, sums_du_xhat_ptr, sum_du_ptr, sum_du_xhat_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    weight_ptr, scale_ptr, scale_stride, G, S, frames, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`combine_gradient_sums` of the group numbered n·G + g."""
    n = (group // G).to(tl.int64)
    C = G * CHANNELS
    count = tl.cast(S, tl.float32) * CHANNELS
    total_dz = tl.zeros([BLOCK_C, 1], tl.float32)
    total_dz_xhat = tl.zeros([BLOCK_C, 1], tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)[:, None]
        c = (group % G) * CHANNELS + k
        sum_du = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
        sum_du_xhat = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)[None, :]
            inside = (k < CHANNELS) & (tile < tiles)
            at = (n * tiles + tile) * C + c
            sum_du += tl.load(sums_du_ptr + at, inside, other=0.0)
            sum_du_xhat += tl.load(sums_du_xhat_ptr + at, inside, other=0.0)
        sum_du = tl.sum(sum_du, 1, keep_dims=True)  # [BLOCK_C, 1]
        sum_du_xhat = tl.sum(sum_du_xhat, 1, keep_dims=True)
        tl.store(sum_du_ptr + n * C + c, sum_du, k < CHANNELS)
        tl.store(sum_du_xhat_ptr + n * C + c, sum_du_xhat, k < CHANNELS)
        gain, _ = channel_transform(weight_ptr, None, scale_ptr, None, scale_stride, 0, n // frames, c, k < CHANNELS)
        total_dz += gain * sum_du
        total_dz_xhat += gain * sum_du_xhat
    tl.store(mean_dz_ptr + group, tl.div_rn(tl.sum(tl.sum(total_dz, 1), 0), count))
    tl.store(mean_dz_xhat_ptr + group, tl.div_rn(tl.sum(tl.sum(total_dz_xhat, 1), 0), count))


@triton.jit
def apply_backward(
    dy_ptr, x_ptr, skip_ptr, dx_ptr, dskip_ptr, mean_ptr, rstd_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    G, S, frames, C_SKIP, tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx and dskip of one tile."""
    C = G * CHANNELS
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # as in apply_forward
    n, _, c, first_s, i, inside = tile_position(program, C, S, tiles, BLOCK_C, BLOCK_S)
    du, xhat, rstd, gain = tile_gradients(
        dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr,
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        n, c, first_s, i, inside, G, S, frames, C_SKIP, CHANNELS, CHANNELS_LAST, SILU,
    )  # fmt: skip
    store_input_gradients(
        du, xhat, rstd, gain, dx_ptr, dskip_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
        n, c, first_s, i, inside, G, S, C_SKIP, CHANNELS, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def store_input_gradients(
    du, xhat, rstd, gain, dx_ptr, dskip_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    n, c, first_s, i, inside, G, S, C_SKIP, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx and dskip of a tile of which `gradients` are there."""
    C = G * CHANNELS
    group = n * G + c // CHANNELS
    mean_dz = tl.load(mean_dz_ptr + group, c < C, other=0.0)
    mean_dz_xhat = tl.load(mean_dz_xhat_ptr + group, c < C, other=0.0)
    dx = rstd * (gain * du - mean_dz - xhat * mean_dz_xhat)
    dx_at = elements(dx_ptr, dskip_ptr, n, c, first_s, i, C, C_SKIP, S, CHANNELS_LAST)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), inside)
