"""temporal_attention: attention over the frames of a clip at every position, read in place."""

from torch import Tensor

from mdm_kernels import backend
from mdm_kernels.attention import checks
from mdm_kernels.temporal import reference


def _check(qkv: Tensor, num_heads: int, frames: int, rotary: Tensor | None) -> None:
    head_width = checks.split_heads("qkv", qkv, 3, num_heads)
    checks.check_alike(qkv=qkv)
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
            f"rotary has shape {tuple(rotary.shape)}; it must be (frames, half the head width) = "
            f"{(frames, head_width // 2)}"
        )
    if not rotary.is_floating_point():
        raise TypeError(f"rotary has dtype {rotary.dtype}; it must be floating point: angles in radians")
    if rotary.device != qkv.device:
        raise ValueError(f"rotary is on {rotary.device}; it must be on qkv's device, {qkv.device}")


def temporal_attention(qkv: Tensor, *, num_heads: int, frames: int, rotary: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D) v over the T = `frames` frames of a clip, at each of its L positions.

    qkv (B·T, L, 3C), the frames of a clip in consecutive rows: channels hold q, k, v, each (num_heads, D); any
    strides; float16, bfloat16 or float32 (float64 on the "torch" backend), D ≤ 128. rotary (T, D/2), angles in radians:
    before the product the channels (2i, 2i+1) of q and k in frame t are turned by rotary[t, i] (Su et al., arXiv
    2104.09864); no gradient reaches the angles. → (B·T, L, C) in qkv's dtype and memory order. Under autocast qkv is
    cast. Raises ValueError or TypeError naming the argument whose shape, dtype or device does not fit.
    """
    (qkv,) = backend.autocast(qkv)
    _check(qkv, num_heads, frames, rotary)
    rotary = None if rotary is None else rotary.detach()
    return reference.temporal_attention(qkv, num_heads, frames, rotary)
