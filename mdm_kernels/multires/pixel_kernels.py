"""Tiles of three channels that lie side by side in memory (channels last), moved in wide pieces and dealt in registers.

The elements of one channel of such a tile lie three apart, so that each costs a load of its own. But four pixels are
twelve elements in a row, moved here in three pieces of four; and a thread computes those four pixels anyway, so that
sorting them by channel moves nothing between threads.
"""

import triton
import triton.language as tl


@triton.jit
def join_fours(x0, x1, x2, x3):
    """Four [M, N] → [M, N, 2, 2], the four of a place in order."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def split_fours(x, M: tl.constexpr, N: tl.constexpr):
    """[M, 4N] or [M, N, 4] → four [M, N], the four of a place in order."""
    even, odd = tl.split(tl.reshape(x, (M, N, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def pixel_offsets(top, left, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of each four pixels, where the first four of their twelve elements lie in a frame, int64 [BLOCK_H, BLOCK_W/4, 4],
    and whether they exist [BLOCK_H, BLOCK_W/4, 1]; 4 divides W."""
    h = top + tl.arange(0, BLOCK_H)[:, None, None]
    w = left + 4 * tl.arange(0, BLOCK_W // 4)[None, :, None]
    offset = (h * W + w) * 3 + tl.arange(0, 4)[None, None, :]
    return offset.to(tl.int64), (h < H) & (w < W)


@triton.jit
def load_pixels(pointers, exist):
    """The three channels [BLOCK_H, BLOCK_W] of the pixels at `pixel_offsets`; 0 where there are none."""
    M: tl.constexpr = pointers.shape[0]
    N: tl.constexpr = pointers.shape[1]
    r0, g0, b0, r1 = split_fours(tl.load(pointers, exist, other=0.0), M, N)
    g1, b1, r2, g2 = split_fours(tl.load(pointers + 4, exist, other=0.0), M, N)
    b2, r3, g3, b3 = split_fours(tl.load(pointers + 8, exist, other=0.0), M, N)
    red = tl.reshape(join_fours(r0, r1, r2, r3), (M, 4 * N))
    green = tl.reshape(join_fours(g0, g1, g2, g3), (M, 4 * N))
    blue = tl.reshape(join_fours(b0, b1, b2, b3), (M, 4 * N))
    return red, green, blue


@triton.jit
def store_pixels(pointers, channels, exist):
    """Write three channels [BLOCK_H, BLOCK_W] where `load_pixels` would read them."""
    M: tl.constexpr = pointers.shape[0]
    N: tl.constexpr = pointers.shape[1]
    r0, r1, r2, r3 = split_fours(channels[0], M, N)
    g0, g1, g2, g3 = split_fours(channels[1], M, N)
    b0, b1, b2, b3 = split_fours(channels[2], M, N)
    tl.store(pointers, tl.reshape(join_fours(r0, g0, b0, r1), (M, N, 4)), exist)
    tl.store(pointers + 4, tl.reshape(join_fours(g1, b1, r2, g2), (M, N, 4)), exist)
    tl.store(pointers + 8, tl.reshape(join_fours(b2, r3, g3, b3), (M, N, 4)), exist)
