"""Memory formats: which one a tensor has, and the same values in a given one."""

from typing import overload

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""by a tensor's dimensions, the format that torch has for them"""


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (N, C, *spatial) lie side by side, and x is not contiguous: its format is channels
    last then, in every number of dimensions, and contiguous otherwise."""
    return not x.is_contiguous() and x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1


def is_dense(x: Tensor, channels_last: bool) -> bool:
    """Whether x is dense in that memory format."""
    if not channels_last:
        return x.is_contiguous()
    if x.dim() in CHANNELS_LAST:
        return x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
    return x.movedim(1, -1).is_contiguous()


@overload
def dense(x: Tensor, channels_last: bool) -> Tensor: ...
@overload
def dense(x: None, channels_last: bool) -> None: ...
def dense(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """Give x itself if it is None or dense in that memory format, a copy otherwise."""
    if x is None or is_dense(x, channels_last):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def empty(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    """Make an uninitialised tensor like x, but for the number of its channels, dense in that memory format."""
    if channels == x.shape[1] and is_dense(x, channels_last):
        return torch.empty_like(x)
    rows, _, *spatial = x.shape
    if channels_last:
        return x.new_empty(rows, *spatial, channels).movedim(-1, 1)
    return x.new_empty(rows, channels, *spatial)


def concatenated(x: Tensor, skip: Tensor) -> Tensor:
    """Join x and the skip along channels, in x's memory format."""
    return dense(torch.cat([x, skip], 1), is_channels_last(x))


def dense_format(x: Tensor) -> torch.memory_format:
    """Give channels last if x (4-D or 5-D) is dense in it; contiguous for every other layout, which costs it one
    copy."""
    last = CHANNELS_LAST[x.dim()]
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
