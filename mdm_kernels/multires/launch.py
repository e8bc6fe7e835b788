"""How the images of the levels reach the kernels: memory formats, pooling from level to level, tiles, launches."""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, tiles
from ..layouts import dense_format
from ..tiles import next_power_of_2
from . import reference
from .checks import level_shape

TILE_ELEMENTS = 1024  # 8 a thread at 4 warps: the noise of more would cost too many registers
LARGEST_RATIO = 16  # of one level to the next in a kernel: a tile holds whole pooling windows
GRADIENT_BLOCK = 2048


class Level(NamedTuple):
    """What a launch needs to know about one level."""

    image: Tensor  # the samples needed here, at this level's resolution
    pooled: Tensor | None  # float32: where the kernel writes the next level's image
    time_ratio: int  # from this level to the next; 1 if pooled is None
    space_ratio: int
    channels: int
    frames: int
    height: int
    width: int
    block_h: int
    block_w: int
    tiles: int  # a sample

    @property
    def grid(self) -> tuple[int]:
        return (self.image.shape[0] * self.tiles,)

    @property
    def arguments(self) -> dict:
        """The arguments that every kernel of a level takes, by name."""
        return {
            **{"image_ptr": self.image, "pooled_ptr": self.pooled},
            **{"C": self.channels, "T": self.frames, "H": self.height, "W": self.width},
            **{"POOL": self.pooled is not None, "TIME_RATIO": self.time_ratio, "SPACE_RATIO": self.space_ratio},
            **{"BLOCK_H": self.block_h, "BLOCK_W": self.block_w, "num_warps": 4},
        }


def plan_levels(images: Tensor, strides: list[tuple[int, int]], rows: list[int]) -> list[Level]:
    """Plan the launches level by level, with room for the pooled images; rows: how many leading samples each level is
    wanted for.

    A level whose image no kernel can pool from the level before (the first one at a stride other than 1, a ratio that
    is no power of two) is pooled by PyTorch.
    """
    memory_format = dense_format(images)
    images = images.contiguous(memory_format=memory_format)
    ratios = [_fused_ratio(a, b) for a, b in itertools.pairwise(strides)] + [None]
    needed = list(rows)
    for i in reversed(range(len(strides) - 1)):
        needed[i] = max(rows[i], needed[i + 1]) if ratios[i] else rows[i]

    levels, pooled = [], None
    for i, (stride, ratio) in enumerate(zip(strides, ratios, strict=True)):
        image = (images if pooled is None else pooled)[: needed[i]]
        if pooled is None and stride != (1, 1):
            image = reference.level_image(image, stride).contiguous(memory_format=memory_format)
        pooled = None
        if ratio:
            shape = (needed[i], *level_shape(images, strides[i + 1])[1:])
            pooled = torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=memory_format)
        time_ratio, space_ratio = ratio or (1, 1)
        frames = 1 if image.dim() == 4 else image.shape[2]
        height, width = image.shape[-2:]
        block_h, block_w = tile_shape(height, width, space_ratio)
        count = frames * tiles.count(height, block_h) * tiles.count(width, block_w)
        levels.append(
            Level(
                image, pooled, time_ratio, space_ratio,
                image.shape[1], frames, height, width, block_h, block_w, count,
            )
        )  # fmt: skip
    return levels


@functools.cache
def tile_shape(height: int, width: int, space_ratio: int) -> tuple[int, int]:
    """Give (BLOCK_H, BLOCK_W) for a level of this size: whole groups of 4 columns, whole windows of `space_ratio`
    pixels."""
    widest = TILE_ELEMENTS // max(space_ratio, 8)
    block_w = min(widest, max(4, space_ratio, next_power_of_2(width)))
    block_h = max(space_ratio, min(TILE_ELEMENTS // block_w, next_power_of_2(height)))
    return block_h, block_w


def _fused_ratio(stride: tuple[int, int], coarser: tuple[int, int]) -> tuple[int, int] | None:
    """(time, space) from one level to the next if a kernel can pool by it, else None."""
    if coarser[0] % stride[0] or coarser[1] % stride[1]:
        return None
    space = coarser[1] // stride[1]
    return (coarser[0] // stride[0], space) if space <= LARGEST_RATIO and space & (space - 1) == 0 else None


def has_whole_pixels(x: Tensor) -> bool:
    """Whether pixel_kernels.py can move x: its three channels lie side by side, its rows are whole fours of pixels."""
    return dense_format(x) != torch.contiguous_format and x.shape[1] == 3 and x.shape[-1] % 4 == 0


def split_seed(seed: int | Tensor | None) -> tuple[int | None, Tensor | None]:
    """Split a seed into what the ops take: the integer, or the tensor that the kernels read it from."""
    return (None, seed) if isinstance(seed, Tensor) else (seed, None)


def fits(images: Tensor, *others: Tensor) -> bool:
    """Whether the kernels compute this: nothing in float64, and no frame of 2³¹ elements."""
    frame = images.shape[1] * images.shape[-2] * images.shape[-1]
    return frame < 2**31 and all(tensor.dtype != torch.float64 for tensor in (images, *others))


def noise(
    images: Tensor, alpha_bars: Tensor, strides: list[tuple[int, int]], noise: list[Tensor], seed: int | None,
    device_seed: Tensor | None, x_t: list[Tensor],
) -> None:  # fmt: skip
    """Write x_t of every level to `x_t`, tensors of the levels' shapes."""
    from . import kernels

    alpha_bars, memory_format = alpha_bars.float().contiguous(), dense_format(images)
    for i, level in enumerate(plan_levels(images, strides, [images.shape[0]] * len(strides))):
        backend.launch(
            kernels.noise_level,
            level.grid,
            **level.arguments,
            **_noise_arguments(noise[i] if noise else None, seed, device_seed, strides[i], memory_format),
            alpha_bar_ptr=alpha_bars[i],
            x_t_ptr=x_t[i],
            CHANNELS_LAST=memory_format != torch.contiguous_format,
        )


def loss_forward(
    preds: list[Tensor], images: Tensor, alpha_bars: Tensor, strides: list[tuple[int, int]], noise: list[Tensor],
    seed: int | None, device_seed: Tensor | None, spaces: dict[str, str], weights: list[float],
    residuals: list[Tensor], per_level: bool,
) -> Tensor:  # fmt: skip
    """Give the loss (B,), or its terms (levels, B), and write pred − target of every level, if there are residuals to
    write to."""
    from . import kernels

    alpha_bars, memory_format = alpha_bars.float().contiguous(), dense_format(images)
    levels = plan_levels(images, strides, [pred.shape[0] for pred in preds])
    # One number a tile; zeros, since a mixed batch leaves some tiles without a prediction.
    partials = torch.zeros(
        images.shape[0], sum(level.tiles for level in levels), dtype=torch.float32, device=images.device
    )
    for i, (level, pred) in enumerate(zip(levels, preds, strict=True)):
        backend.launch(
            kernels.loss_level,
            level.grid,
            **level.arguments,
            **_noise_arguments(noise[i] if noise else None, seed, device_seed, strides[i], memory_format),
            pred_ptr=pred,
            alpha_bar_ptr=alpha_bars[i],
            residual_ptr=residuals[i] if residuals else None,
            partial_ptr=partials,
            rows=pred.shape[0],
            scale=weights[i] / max(pred.shape[1:].numel(), 1),
            partials=partials.shape[1],
            first_partial=sum(before.tiles for before in levels[:i]),
            WITH_RESIDUAL=bool(residuals),
            IMAGE_LAST=memory_format != torch.contiguous_format,
            PRED_LAST=dense_format(pred) != torch.contiguous_format,
            PRED_PIXELS=has_whole_pixels(pred),
            SMALLEST_DENOMINATOR=reference.SMALLEST_DENOMINATOR,
            **spaces,
        )
    if not per_level:
        return partials.sum(1)
    return torch.stack([terms.sum(1) for terms in partials.split([level.tiles for level in levels], 1)])


def loss_backward(
    residuals: list[Tensor], upstream: Tensor, alpha_bars: Tensor, spaces: dict[str, str], weights: list[float],
    gradients: list[Tensor],
) -> None:  # fmt: skip
    """Write the gradients of the predictions to `gradients`, tensors of their shapes."""
    from . import kernels

    upstream, alpha_bars = upstream.float().contiguous(), alpha_bars.float().contiguous()
    for i, (residual, gradient) in enumerate(zip(residuals, gradients, strict=True)):
        elements = residual.shape[1:].numel()
        backend.launch(
            kernels.residual_gradient,
            (residual.shape[0] * tiles.count(elements, GRADIENT_BLOCK),),
            residual_ptr=residual,
            upstream_ptr=upstream[i] if upstream.dim() == 2 else upstream,
            alpha_bar_ptr=alpha_bars[i],
            gradient_ptr=gradient,
            scale=weights[i] / max(elements, 1),
            elements=elements,
            SMALLEST_DENOMINATOR=reference.SMALLEST_DENOMINATOR,
            BLOCK=GRADIENT_BLOCK,
            num_warps=4,
            **spaces,
        )


def _noise_arguments(
    noise: Tensor | None, seed: int | None, device_seed: Tensor | None, stride: tuple[int, int], memory_format
) -> dict:
    """Where a level's noise comes from: a tensor, or a seed that is a number or lies in memory."""
    low, high = _philox_key(seed)
    return {
        "noise_ptr": None if noise is None else noise.contiguous(memory_format=memory_format),
        **{"seed_ptr": device_seed, "key_low": low, "key_high": high, "level": reference.level_word(stride)},
        "SEEDED": noise is None,
    }


def _philox_key(seed: int | None) -> tuple[int, int]:
    """The key's low and high word as signed 32-bit integers, which Triton passes alike whatever their size."""
    words = (seed or 0) & 0xFFFFFFFF, (seed or 0) >> 32
    low, high = (word - 2**32 if word >= 2**31 else word for word in words)
    return low, high
