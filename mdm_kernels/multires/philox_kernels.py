"""Standard normal numbers in registers, for the kernels: `reference.philox_normal` in few instructions.

The random words are the reference's, bit for bit. At every one of their 2²⁴ arguments the logarithm is right to 2.4e-7
of itself, cosine and sine to 1.8e-7. The polynomials are minimax fits on just those arguments, of the fewest terms with
which rounding is still the larger error; coefficients were rounded to float32 one after the other, the others fitted
anew. General functions cost twice as much: they must cope with any argument.
"""

import triton
import triton.language as tl

from .pixel_kernels import join_fours


@triton.jit
def philox_key(seed_ptr, key_low, key_high):
    """The key's two words: those of a seed in memory if there is one, else those given."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        low, high = key_low.to(tl.uint32), key_high.to(tl.uint32)
    return low, high


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words. Both halves of a product come from one multiplication of 64 bits, which is one
    instruction; `tl.philox_impl` asks for them one by one, and gets two."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, product1.to(tl.uint32)
        c2, c3 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1, product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def minus_two_log(bits):
    """−2 ln u ≥ 0 in float32, u = (⌊bits / 2⁸⌋ + 1) · 2⁻²⁴.

    u is split into 2ᵉ and a mantissa in [2/3, 4/3), so that e = 0 and no cancellation wherever the logarithm is near 0.
    """
    scaled = ((bits >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True)  # u · 2²⁴, exactly
    exponent = (scaled - 0x4B2AAAAB) & -0x800000  # e · 2²³; subtracted are the bits of 2/3 · 2²⁴
    t = (scaled - exponent).to(tl.float32, bitcast=True) * 5.9604644775390625e-08 - 1.0  # mantissa − 1
    p = -0.34337675571441650 + t * 0.33224657177925110
    p = -0.39577269554138184 + t * (0.32271260023117065 + t * p)
    p = -0.66675746440887450 + t * (0.50055456161499020 + t * p)
    p = -2.0 + t * (0.99999028444290160 + t * p)
    return t * p + exponent.to(tl.float32) * -1.6525917e-07  # −2 ln 2 · 2⁻²³


@triton.jit
def box_muller(bits0, bits1):
    """Two normals of two uint32 words: √(−2 ln u) times cosine and sine of ⌊bits1 / 2⁸⌋ · 2⁻²⁴ turns.

    The angle is reduced to the nearest half turn, exactly: that is bit 31 of bits1 + 2³⁰, and its sign is both the
    cosine's and the sine's. The 23 bits below are put into the mantissa of a float32 in [1, 2).
    """
    radius = tl.sqrt(minus_two_log(bits0))
    sign = tl.add(bits1, 0x40000000, sanitize_overflow=False) & 0x80000000
    radius = (radius.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    t = (((bits1 >> 8) & 0x7FFFFF) ^ 0x3FC00000).to(tl.float32, bitcast=True) - 1.5  # half turns, in [−½, ½)
    x = t * t
    cosine = 4.0583992004394531 + x * (-1.3318091630935669 + x * 0.21956668794155121)
    cosine = 0.99999994039535522 + x * (-4.9347920417785645 + x * cosine)
    sine = 2.5499577522277832 + x * (-0.59762531518936157 + x * 0.076433405280113220)
    sine = t * (3.1415925025939941 + x * (-5.1677021980285645 + x * sine))
    return radius * cosine, radius * sine


@triton.jit
def philox_normal(key_low, key_high, level, sample, row, group):
    """The noise of `reference.philox_normal` in a tile: row (c·T + t)·H + h [BLOCK_H, 1], group ⌊w/4⌋ [1, BLOCK_W/4] →
    [BLOCK_H, BLOCK_W]. One Philox call makes four neighbouring columns."""
    bits0, bits1, bits2, bits3 = philox_4x32(
        group.to(tl.uint32),
        row.to(tl.uint32),
        sample.to(tl.uint32),
        level.to(tl.uint32),
        key_low,
        key_high,
    )
    normal0, normal1 = box_muller(bits0, bits1)
    normal2, normal3 = box_muller(bits2, bits3)
    fours = join_fours(normal0, normal1, normal2, normal3)
    return tl.reshape(fours, (fours.shape[0], fours.shape[1] * 4))
