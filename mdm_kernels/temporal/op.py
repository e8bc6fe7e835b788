"""temporal_attention: registration → autograd → public function."""

import torch
from torch import Tensor

from .. import arguments, backend
from ..library import Derivative, below_autograd, define, register_derivative
from . import checks, launch, reference


@define("temporal_attention_forward(Tensor qkv, Tensor? cos, Tensor? sin, int num_heads, int frames) -> Tensor")
def _forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, frames: int) -> Tensor:
    out = torch.empty_like(qkv[:, :, : qkv.shape[2] // 3])
    if not backend.shapes_only(qkv):
        launch.forward(qkv, cos, sin, out, num_heads, frames)
    return out


@define(
    "temporal_attention_backward(Tensor grad, Tensor qkv, Tensor? cos, Tensor? sin, int num_heads, int frames)"
    " -> Tensor"
)
def _backward(grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, frames: int) -> Tensor:
    dqkv = torch.empty_like(qkv)
    if not backend.shapes_only(qkv):
        launch.backward(grad, qkv, cos, sin, dqkv, num_heads, frames)
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
    """Compute softmax(q kᵀ/√D) v over the T = `frames` frames of a clip, at each of its L positions.

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
    checks.check_arguments(qkv, num_heads, frames, rotary)
    rotary = None if rotary is None else rotary.detach()
    head_width = qkv.shape[2] // (3 * num_heads)
    if not backend.runs_triton(qkv, fits=launch.fits(frames, head_width, qkv.element_size())):
        return reference.temporal_attention(qkv, num_heads, frames, rotary)
    angles = None if rotary is None else rotary.to(torch.float32).contiguous()
    cos, sin = (None, None) if angles is None else (angles.cos(), angles.sin())
    return _forward(qkv, cos, sin, num_heads, frames)
