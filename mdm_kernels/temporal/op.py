"""temporal_attention: attention over the frames of a clip at every position, read in place."""

import torch
from torch import Tensor

from mdm_kernels import arguments, backend
from mdm_kernels.attention import checks
from mdm_kernels.library import Derivative, below_autograd, define, register_derivative
from mdm_kernels.temporal import reference, tiling


def _check(qkv: Tensor, num_heads: int, frames: int, rotary: Tensor | None) -> None:
    head_width = checks.split_heads("qkv", qkv, 3, num_heads)
    checks.check_alike(qkv=qkv)
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


@define(
    "temporal_attention_forward(Tensor qkv, Tensor? cos, Tensor? sin, int num_heads, int frames) -> Tensor"
)
def _forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, frames: int) -> Tensor:
    rows, positions, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty_like(qkv[:, :, :channels])
    if backend.shapes_only(qkv):
        return out
    from mdm_kernels.temporal import kernels

    width = channels // num_heads
    options = tiling.tile_options(frames, width, qkv.element_size())
    backend.launch(
        kernels.temporal_forward,
        tiling.grid(rows // frames, positions, num_heads, frames, options["ROWS"]),
        *(qkv, cos, sin, out, *qkv.stride(), *out.stride(), num_heads, positions, width**-0.5),
        **{"T": frames, "D": width, "ROTARY": cos is not None},
        **options,
    )
    return out


@define(
    "temporal_attention_backward(Tensor grad, Tensor qkv, Tensor? cos, Tensor? sin, int num_heads, int frames)"
    " -> Tensor"
)
def _backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, frames: int
) -> Tensor:
    rows, positions, channels = grad.shape
    dqkv = torch.empty_like(qkv)
    if backend.shapes_only(qkv):
        return dqkv
    from mdm_kernels.temporal import kernels

    width = channels // num_heads
    options = tiling.tile_options(frames, width, qkv.element_size())
    backend.launch(
        kernels.temporal_backward,
        tiling.grid(rows // frames, positions, num_heads, frames, options["ROWS"]),
        *(qkv, cos, sin, grad, dqkv, *qkv.stride(), *grad.stride(), *dqkv.stride(), num_heads, positions, width**-0.5),
        **{"T": frames, "D": width, "ROTARY": cos is not None},
        **options,
    )
    return dqkv


class _TemporalAttention(Derivative):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads, frames):
        ctx.save_for_backward(qkv, cos, sin)
        ctx.sizes = num_heads, frames
        return below_autograd(_forward, qkv, cos, sin, num_heads, frames)

    @staticmethod
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


register_derivative(_forward, _TemporalAttention.apply)


def temporal_attention(qkv: Tensor, *, num_heads: int, frames: int, rotary: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D) v over the T = `frames` frames of a clip, at each of its L positions.

    qkv (B·T, L, 3C), the frames of a clip in consecutive rows: channels hold q, k, v, each (num_heads, D); any
    strides; float16, bfloat16 or float32 (float64 on the "torch" backend). rotary (T, D/2), angles in radians: before
    the product the channels (2i, 2i+1) of q and k in frame t are turned by rotary[t, i] (Su et al., arXiv 2104.09864);
    no gradient reaches the angles. → (B·T, L, C) in qkv's dtype and memory order. Under autocast qkv is cast. Where
    D > 128, or T × D, each rounded up to a power of two, passes 4096 (in float32: 2048), the reference runs on every
    device. Raises ValueError or TypeError naming the argument whose shape, dtype or device does not fit; second
    derivatives raise RuntimeError where the kernel runs.
    """
    arguments.check_tensors(qkv=qkv)
    arguments.check_optional_tensors(rotary=rotary)
    (qkv,) = backend.autocast(qkv)
    _check(qkv, num_heads, frames, rotary)
    rotary = None if rotary is None else rotary.detach()
    head_width = qkv.shape[2] // (3 * num_heads)
    if not backend.runs_triton(qkv) or not tiling.fits(frames, head_width, qkv.element_size()):
        return reference.temporal_attention(qkv, num_heads, frames, rotary)
    angles = None if rotary is None else rotary.to(torch.float32).contiguous()
    cos, sin = (None, None) if angles is None else (angles.cos(), angles.sin())
    return _forward(qkv, cos, sin, num_heads, frames)
