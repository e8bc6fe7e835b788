"""What temporal_attention asks of its arguments; every error names the argument, what it is and what it must be."""

from torch import Tensor

from .. import arguments
from ..attention.checks import check_alike, split_heads


def check_arguments(qkv: Tensor, num_heads: int, frames: int, rotary: Tensor | None) -> None:
    """Raise ValueError or TypeError unless qkv (B·T, L, 3C), num_heads, frames T and rotary (T, D/2) are what
    `temporal_attention` takes."""
    head_width = split_heads("qkv", qkv, 3, num_heads)
    check_alike(qkv=qkv)
    arguments.check_ints(frames=frames)
    if frames < 1 or qkv.shape[0] % frames:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; its first size must be a multiple of frames, with frames = {frames}"
        )
    if rotary is None:
        return
    if head_width % 2:
        raise ValueError(f"rotary turns pairs of channels, but qkv {tuple(qkv.shape)} has heads {head_width} wide")
    if rotary.shape != (frames, head_width // 2):
        raise ValueError(
            f"rotary has shape {tuple(rotary.shape)}; with qkv {tuple(qkv.shape)} and num_heads = {num_heads} it must "
            f"be (frames, half the head width) = {(frames, head_width // 2)}"
        )
    if not rotary.is_floating_point():
        raise TypeError(f"rotary has dtype {rotary.dtype}; it must be floating point: angles in radians")
    if rotary.device != qkv.device:
        raise ValueError(f"rotary is on {rotary.device}; it must be on qkv's device, {qkv.device}")
