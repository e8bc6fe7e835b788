"""Triton kernels of multires_noise and multires_loss, one launch a level.

A program has one tile of one frame, in all channels. It reads the image at its level's resolution, and, where the next
level is coarser by a power of two, writes that level's image too, pooled in registers, in float32: the full-resolution
image is read once however many levels there are. Traffic in elements at strides 1, 4: noise 1 + 1 + (2 + 1)/16, where
2/16 is the pooled image's write and read; the loss, with a read of the predictions and a write of the residuals, the
same plus 1 + 1/16.

Tensors are dense, contiguous or channels_last; T is 1 for images. `level` is `reference.level_word`. Whatever changes
from step to step or from level to level alone is not specialised, so that it compiles nothing anew.
"""

import triton
import triton.language as tl

from .philox_kernels import philox_key, philox_normal
from .pixel_kernels import load_pixels, pixel_offsets, store_pixels


@triton.jit
def tile_position(T, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """This program's sample (int64), its tile's number within the sample, frame, first row and first column."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles = tl.cdiv(H, BLOCK_H) * tiles_w
    sample = (tl.program_id(0) // (T * tiles)).to(tl.int64)
    number = tl.program_id(0) % (T * tiles)
    tile = number % tiles
    return sample, number, number // tiles, (tile // tiles_w) * BLOCK_H, (tile % tiles_w) * BLOCK_W


@triton.jit
def element(sample, c, t, h, w, C, T, H, W, CHANNELS_LAST: tl.constexpr):
    """Where (sample, c, t, h, w) lies in a dense tensor: an int64 to the frame, and an int32 within it, which is enough
    for frames of fewer than 2³¹ elements (`launch.fits`) and leaves registers for the noise."""
    if CHANNELS_LAST:
        offset = (sample * T + t) * H * W * C + ((h * W + w) * C + c)
    else:
        offset = ((sample * C + c) * T + t) * H * W + (h * W + w)
    return offset


@triton.jit
def noise_tile(
    noise_ptr, offset, inside, key_low, key_high, level, sample, c, t, h, left, T, H,
    SEEDED: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """ε of a tile [BLOCK_H, BLOCK_W] in float32: drawn from the key, or loaded."""
    if SEEDED:
        group = left // 4 + tl.arange(0, BLOCK_W // 4)
        eps = philox_normal(key_low, key_high, level, sample, (c * T + t) * H + h, group[None, :])
    else:
        eps = tl.load(noise_ptr + offset, inside, other=0.0).to(tl.float32)
    return eps


@triton.jit
def store_pooled(
    pooled_ptr, x, sample, c, t, top, left, C, T, H, W,
    CHANNELS_LAST: tl.constexpr, TIME_RATIO: tl.constexpr, SPACE_RATIO: tl.constexpr,
):  # fmt: skip
    """Write a tile x [BLOCK_H, BLOCK_W] averaged over SPACE_RATIO² pixels, if its frame is the first of TIME_RATIO."""
    if t % TIME_RATIO == 0:
        rows: tl.constexpr = x.shape[0] // SPACE_RATIO
        columns: tl.constexpr = x.shape[1] // SPACE_RATIO
        windows = tl.reshape(x, (rows, SPACE_RATIO, columns, SPACE_RATIO))
        mean = tl.sum(tl.sum(windows, 3), 1) * (1.0 / (SPACE_RATIO * SPACE_RATIO))  # [rows, columns]
        h = top // SPACE_RATIO + tl.arange(0, rows)[:, None]
        w = left // SPACE_RATIO + tl.arange(0, columns)[None, :]
        pooled_t, pooled_h, pooled_w = T // TIME_RATIO, H // SPACE_RATIO, W // SPACE_RATIO
        offset = element(sample, c, t // TIME_RATIO, h, w, C, pooled_t, pooled_h, pooled_w, CHANNELS_LAST)
        tl.store(pooled_ptr + offset, mean, (h < pooled_h) & (w < pooled_w))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def noise_level(
    image_ptr, noise_ptr, alpha_bar_ptr, x_t_ptr, pooled_ptr, seed_ptr, key_low, key_high, level, C, T, H, W,
    SEEDED: tl.constexpr, CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, TIME_RATIO: tl.constexpr,
    SPACE_RATIO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """x_t of a tile at one level, and with POOL the next level's image."""
    sample, _, t, top, left = tile_position(T, H, W, BLOCK_H, BLOCK_W)
    h = top + tl.arange(0, BLOCK_H)[:, None]
    w = left + tl.arange(0, BLOCK_W)[None, :]
    inside = (h < H) & (w < W)
    key_low, key_high = philox_key(seed_ptr, key_low, key_high)
    alpha_bar = tl.load(alpha_bar_ptr + sample)
    signal, sigma = tl.sqrt_rn(alpha_bar), tl.sqrt_rn(1.0 - alpha_bar)
    for c in range(C):
        offset = element(sample, c, t, h, w, C, T, H, W, CHANNELS_LAST)
        x = tl.load(image_ptr + offset, inside, other=0.0).to(tl.float32)
        eps = noise_tile(
            noise_ptr, offset, inside, key_low, key_high, level, sample, c, t, h, left, T, H, SEEDED, BLOCK_W
        )
        tl.store(x_t_ptr + offset, signal * x + sigma * eps, inside)
        if POOL:
            store_pooled(pooled_ptr, x, sample, c, t, top, left, C, T, H, W, CHANNELS_LAST, TIME_RATIO, SPACE_RATIO)


@triton.jit
def squared_size(alpha_bar, SPACE: tl.constexpr):
    """Of an error of 1 in v, measured in another space (`reference.loss_factor`)."""
    if SPACE == "eps":
        size = alpha_bar
    elif SPACE == "x0":
        size = 1.0 - alpha_bar
    else:
        size = alpha_bar * 0.0 + 1.0
    return size


@triton.jit
def loss_factor(alpha_bar, PREDICTION: tl.constexpr, LOSS_TARGET: tl.constexpr, SMALLEST_DENOMINATOR: tl.constexpr):
    if PREDICTION == LOSS_TARGET:
        factor = alpha_bar * 0.0 + 1.0
    else:
        denominator = tl.maximum(squared_size(alpha_bar, PREDICTION), SMALLEST_DENOMINATOR)
        factor = tl.div_rn(squared_size(alpha_bar, LOSS_TARGET), denominator)
    return factor


@triton.jit
def residual_tile(
    pred, image_ptr, noise_ptr, pooled_ptr, signal, sigma, key_low, key_high, level, sample, c, t,
    top, left, C, T, H, W,
    SEEDED: tl.constexpr, PREDICTION: tl.constexpr, IMAGE_LAST: tl.constexpr,
    POOL: tl.constexpr, TIME_RATIO: tl.constexpr, SPACE_RATIO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """pred − target [BLOCK_H, BLOCK_W] of channel c in float32; with POOL, writes the next level's image too."""
    h = top + tl.arange(0, BLOCK_H)[:, None]
    w = left + tl.arange(0, BLOCK_W)[None, :]
    inside = (h < H) & (w < W)
    offset = element(sample, c, t, h, w, C, T, H, W, IMAGE_LAST)
    x = tl.load(image_ptr + offset, inside, other=0.0).to(tl.float32)
    eps = noise_tile(noise_ptr, offset, inside, key_low, key_high, level, sample, c, t, h, left, T, H, SEEDED, BLOCK_W)
    if POOL:
        store_pooled(pooled_ptr, x, sample, c, t, top, left, C, T, H, W, IMAGE_LAST, TIME_RATIO, SPACE_RATIO)
    if PREDICTION == "v":
        target = signal * eps - sigma * x
    elif PREDICTION == "eps":
        target = eps
    else:
        target = x
    return pred.to(tl.float32) - target


@triton.jit(do_not_specialize=["key_low", "key_high", "rows", "partials", "first_partial"])
def loss_level(
    pred_ptr, image_ptr, noise_ptr, alpha_bar_ptr, residual_ptr, pooled_ptr, partial_ptr, seed_ptr, key_low, key_high,
    level, rows, scale, partials, first_partial, C, T, H, W,
    SEEDED: tl.constexpr, PREDICTION: tl.constexpr, LOSS_TARGET: tl.constexpr, SMALLEST_DENOMINATOR: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr, IMAGE_LAST: tl.constexpr, PRED_LAST: tl.constexpr, PRED_PIXELS: tl.constexpr,
    POOL: tl.constexpr, TIME_RATIO: tl.constexpr, SPACE_RATIO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """residual = pred − target, and this tile's share of the loss, into column first_partial + (its number) of
    partial (B, partials). Samples from `rows` on have no prediction: their tiles are only pooled. PRED_PIXELS: whether
    predictions and residuals are moved by pixel_kernels.py (`launch.has_whole_pixels`)."""
    sample, number, t, top, left = tile_position(T, H, W, BLOCK_H, BLOCK_W)
    h = top + tl.arange(0, BLOCK_H)[:, None]
    w = left + tl.arange(0, BLOCK_W)[None, :]
    inside = (h < H) & (w < W)
    key_low, key_high = philox_key(seed_ptr, key_low, key_high)
    alpha_bar = tl.load(alpha_bar_ptr + sample)
    if sample < rows:
        signal, sigma = tl.sqrt_rn(alpha_bar), tl.sqrt_rn(1.0 - alpha_bar)
        squared_error = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
        if PRED_PIXELS:
            place, exist = pixel_offsets(top, left, H, W, BLOCK_H, BLOCK_W)
            place += (sample * T + t) * H * W * 3
            preds = load_pixels(pred_ptr + place, exist)
            residuals = ()
            for c in tl.static_range(3):  # unrolled: which of `preds` it is must be known
                residual = residual_tile(
                    preds[c], image_ptr, noise_ptr, pooled_ptr, signal, sigma, key_low, key_high, level, sample, c, t,
                    top, left, C, T, H, W,
                    SEEDED, PREDICTION, IMAGE_LAST, POOL, TIME_RATIO, SPACE_RATIO, BLOCK_H, BLOCK_W,
                )  # fmt: skip
                squared_error += residual * residual
                residuals += (residual.to(pred_ptr.dtype.element_ty),)
            if WITH_RESIDUAL:
                store_pixels(residual_ptr + place, residuals, exist)
        else:
            for c in range(C):
                pred_offset = element(sample, c, t, h, w, C, T, H, W, PRED_LAST)
                pred = tl.load(pred_ptr + pred_offset, inside, other=0.0)
                residual = residual_tile(
                    pred, image_ptr, noise_ptr, pooled_ptr, signal, sigma, key_low, key_high, level, sample, c, t,
                    top, left, C, T, H, W,
                    SEEDED, PREDICTION, IMAGE_LAST, POOL, TIME_RATIO, SPACE_RATIO, BLOCK_H, BLOCK_W,
                )  # fmt: skip
                squared_error += residual * residual
                if WITH_RESIDUAL:
                    tl.store(residual_ptr + pred_offset, residual, inside)
        squared_error = tl.where(inside, squared_error, 0.0)  # outside, the noise alone was counted
        share = tl.sum(squared_error) * scale * loss_factor(alpha_bar, PREDICTION, LOSS_TARGET, SMALLEST_DENOMINATOR)
        tl.store(partial_ptr + sample * partials + first_partial + number, share)
    elif POOL:
        for c in range(C):
            x = tl.load(image_ptr + element(sample, c, t, h, w, C, T, H, W, IMAGE_LAST), inside, other=0.0)
            x = x.to(tl.float32)
            store_pooled(pooled_ptr, x, sample, c, t, top, left, C, T, H, W, IMAGE_LAST, TIME_RATIO, SPACE_RATIO)


@triton.jit
def residual_gradient(
    residual_ptr, upstream_ptr, alpha_bar_ptr, gradient_ptr, scale, elements,
    PREDICTION: tl.constexpr, LOSS_TARGET: tl.constexpr, SMALLEST_DENOMINATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient = 2 · scale · factor · upstream · residual, for samples of `elements` numbers each."""
    blocks = (elements - 1) // BLOCK + 1  # tl.cdiv would overflow just below 2³¹
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    alpha_bar = tl.load(alpha_bar_ptr + sample)
    factor = loss_factor(alpha_bar, PREDICTION, LOSS_TARGET, SMALLEST_DENOMINATOR)
    slope = 2.0 * scale * factor * tl.load(upstream_ptr + sample)
    offset = sample * elements + column
    residual = tl.load(residual_ptr + offset, column < elements, other=0.0).to(tl.float32)
    tl.store(gradient_ptr + offset, slope * residual, column < elements)
