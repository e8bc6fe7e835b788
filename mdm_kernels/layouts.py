"""Memory formats: which one a tensor has, and the same values in a given one."""

from typing import overload

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (N, C, *spatial) lie side by side, and x is not contiguous: its format is channels
    last then, in every number of dimensions, and contiguous otherwise."""
    return not x.is_contiguous() and x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1


@overload
def dense(x: Tensor, channels_last: bool) -> Tensor: ...
@overload
def dense(x: None, channels_last: bool) -> None: ...
def dense(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """x itself if it is None or dense in that memory format, a copy otherwise."""
    if x is None:
        return None
    if not channels_last:
        return x.contiguous()
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def empty(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    """A tensor like x, but for the number of its channels, dense in that memory format."""
    rows, _, *spatial = x.shape
    if channels_last:
        return x.new_empty(rows, *spatial, channels).movedim(-1, 1)
    return x.new_empty(rows, channels, *spatial)


def concatenated(x: Tensor, skip: Tensor) -> Tensor:
    """x and the skip along channels, in x's memory format."""
    return dense(torch.cat([x, skip], 1), is_channels_last(x))


def dense_format(x: Tensor) -> torch.memory_format:
    """Channels last if x (4-D or 5-D) is dense in it; contiguous for every other layout, which costs it one copy."""
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
