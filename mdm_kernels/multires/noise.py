"""multires_noise: the noisy images of every level, in one pass over the full-resolution image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_kernels import backend
from mdm_kernels.library import define
from mdm_kernels.multires import reference
from mdm_kernels.multires.checks import (
    Stride,
    check_alpha_bars,
    check_no_gradient,
    check_noise,
    checked_strides,
    level_shape,
)
from mdm_kernels.multires.levels import dense_format, fits, is_channels_last, philox_key, plan_levels, split_seed


@define(
    "multires_noise(Tensor images, Tensor alpha_bars, int[] time_strides, int[] space_strides, Tensor[] noise, "
    "SymInt? seed, Tensor? device_seed) -> Tensor[]"
)
def _noise(
    images: Tensor,
    alpha_bars: Tensor,
    time_strides: list[int],
    space_strides: list[int],
    noise: list[Tensor],
    seed: int | None,
    device_seed: Tensor | None,
) -> list[Tensor]:
    """x_t of every level in the images' dtype and memory format; noise is empty where a seed stands for it."""
    strides = list(zip(time_strides, space_strides, strict=True))
    memory_format = dense_format(images)
    x_t = [
        torch.empty(level_shape(images, s), dtype=images.dtype, device=images.device, memory_format=memory_format)
        for s in strides
    ]
    if backend.shapes_only(images):
        return x_t
    from mdm_kernels.multires import kernels

    alpha_bars = alpha_bars.float().contiguous()
    for i, level in enumerate(plan_levels(images, strides, [images.shape[0]] * len(strides))):
        backend.launch(
            kernels.noise_level,
            (level.image.shape[0] * level.tiles,),
            level.image,
            noise[i].contiguous(memory_format=memory_format) if noise else None,
            alpha_bars[i],
            x_t[i],
            level.pooled,
            device_seed,
            *philox_key(seed),
            reference.level_word(strides[i]),
            level.channels,
            level.frames,
            level.height,
            level.width,
            SEEDED=not noise,
            CHANNELS_LAST=is_channels_last(images),
            POOL=level.pooled is not None,
            TIME_RATIO=level.time_ratio,
            SPACE_RATIO=level.space_ratio,
            BLOCK_H=level.block_h,
            BLOCK_W=level.block_w,
            num_warps=4,
        )
    return x_t


def multires_noise(
    images: Tensor,
    alpha_bars: Tensor,
    strides: Sequence[Stride],
    noise: Sequence[Tensor] | None = None,
    *,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    """x_t = √ᾱ·x + √(1−ᾱ)·ε at every level, x being the image at that level's resolution.

    images (B, C, H, W) or (B, C, T, H, W), float32, float16, bfloat16 or float64. strides: one a level, an int or
    (time, space): the level keeps every `time`-th frame and averages `space`×`space` pixels; H, W and T must divide.
    alpha_bars (levels, B) float32. noise: one tensor a level, of its shape; or instead seed in 0…2⁶³−1, which stands
    for the noise that `reference.philox_normal` defines: the same in `multires_loss`, on every device and backend (to
    float32 rounding), and never stored. The seed is an int, or a tensor of one int64 on the images' device that the
    kernel reads when it runs, so that a captured CUDA graph draws new noise after `seed.add_(1)`.

    Returns a list of x_t, one a level, in the images' dtype and memory format. Nothing is differentiated: an argument
    that requires a gradient raises ValueError, as do shapes that do not fit; wrong dtypes raise TypeError.
    """
    strides = checked_strides(images, strides)
    check_alpha_bars(images, alpha_bars, len(strides))
    check_noise(images, strides, noise, seed)
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=noise)
    if fits(images) and backend.runs_triton(images):
        times, spaces = map(list, zip(*strides, strict=True))
        return _noise(images, alpha_bars, times, spaces, list(noise or []), *split_seed(seed))
    if noise is None:
        noise = reference.seeded_noise(images, strides, seed)
    return reference.noised(images, alpha_bars, strides, noise)
