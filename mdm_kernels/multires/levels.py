"""How the images of the levels reach the kernels: memory formats, pooling from one level to the next, tiles."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_kernels.multires import reference
from mdm_kernels.multires.checks import level_shape


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


def plan_levels(images: Tensor, strides: list[tuple[int, int]], rows: list[int]) -> list[Level]:
    """Level by level, with room for the pooled images; rows: how many leading samples each level is wanted for.

    A level whose image no kernel can pool from the level before (the first one at a stride other than 1, a ratio that
    is no power of two) is pooled by PyTorch.
    """
    from mdm_kernels.multires.kernels import LARGEST_RATIO, tile_shape

    memory_format = dense_format(images)
    images = images.contiguous(memory_format=memory_format)
    ratios = [_fused_ratio(a, b, LARGEST_RATIO) for a, b in itertools.pairwise(strides)] + [None]
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
        tiles = frames * -(-height // block_h) * -(-width // block_w)
        levels.append(
            Level(
                image, pooled, time_ratio, space_ratio,
                image.shape[1], frames, height, width, block_h, block_w, tiles,
            )
        )  # fmt: skip
    return levels


def _fused_ratio(stride: tuple[int, int], coarser: tuple[int, int], largest: int) -> tuple[int, int] | None:
    """(time, space) from one level to the next if a kernel can pool by it, else None."""
    if coarser[0] % stride[0] or coarser[1] % stride[1]:
        return None
    space = coarser[1] // stride[1]
    return (coarser[0] // stride[0], space) if space <= largest and space & (space - 1) == 0 else None


def dense_format(x: Tensor) -> torch.memory_format:
    """Channels last if x (4-D or 5-D) is laid out so; contiguous for every other layout, which costs it one copy."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    return dense_format(x) != torch.contiguous_format


def has_whole_pixels(x: Tensor) -> bool:
    """Whether x is such that `pixels.py` moves it: its three channels side by side, its rows whole fours of pixels."""
    return is_channels_last(x) and x.shape[1] == 3 and x.shape[-1] % 4 == 0


def philox_key(seed: int | None) -> tuple[int, int]:
    """The key's low and high word as signed 32-bit integers, which Triton passes alike whatever their size."""
    words = (seed or 0) & 0xFFFFFFFF, (seed or 0) >> 32
    return tuple(word - 2**32 if word >= 2**31 else word for word in words)


def split_seed(seed: int | Tensor | None) -> tuple[int | None, Tensor | None]:
    """A seed as the ops take it: the integer, or the tensor that the kernels read it from."""
    return (None, seed) if isinstance(seed, Tensor) else (seed, None)


def fits(images: Tensor, *others: Tensor) -> bool:
    """Whether the kernels compute this: nothing in float64, and no frame of 2³¹ elements."""
    frame = images.shape[1] * images.shape[-2] * images.shape[-1]
    return frame < 2**31 and all(tensor.dtype != torch.float64 for tensor in (images, *others))
