"""flash_attention and self_cross_attention, each: registration → autograd → public function.

Softmax(q kᵀ) v without the L × S matrix in memory: Dao et al., arXiv 2205.14135, 2307.08691.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments, backend
from ..library import Derivative, below_autograd, define, register_derivative
from . import checks, launch, reference


@define("flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> (Tensor, Tensor)")
def _flash_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output, in the memory order of q, and the log₂-sum-exp of each query's logits, float32 (B, H, L)."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not backend.shapes_only(q):
        launch.flash_forward(q, k, v, key_mask, out, lse, scale)
    return out, lse


@define(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, Tensor lse, "
    "float scale) -> (Tensor, Tensor, Tensor)"
)
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not backend.shapes_only(q):
        launch.flash_backward(grad, q, k, v, key_mask, out, lse, scale, dq, dk, dv)
    return dq, dk, dv


FORWARD_MODE = "mdm_kernels.set_backend('torch') inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
"""torch's fused attention has no forward-mode derivative either."""


class _FlashAttention(Derivative):
    instead = FORWARD_MODE

    @staticmethod
    def forward(ctx, q, k, v, key_mask, scale):
        out, lse = below_autograd(_flash_forward, q, k, v, key_mask, scale)
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        return (*_flash_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


register_derivative(_flash_forward, _FlashAttention.apply)


def _runs_kernel(x: Tensor, head_width: int) -> bool:
    """Whether the kernel runs. In float32 it cannot use an H100's matrix units, and takes 5 to 7 times as long there as
    torch's own attention (benchmarks/NOTES.md)."""
    faster = x.dtype != torch.float32 or torch.version.hip is not None
    return backend.runs_triton(x, fits=head_width <= checks.MAX_HEAD_WIDTH, faster=faster)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(scale · q kᵀ) v with accumulation in float32, in O(L) memory.

    q (B, H, L, D), k and v (B, H, S, D), any strides, float16, bfloat16 or float32 (float64 on the "torch" backend);
    key_mask (B, S) bool, True = attend; scale > 0, 1/√D unless given. → (B, H, L, D) in q's dtype and memory order. A
    row that may attend to no key gives 0 and passes no gradient on. Under autocast the inputs are cast. Heads more than
    128 wide run the reference on every device; so does float32 on NVIDIA's, unless the backend is "triton". Raises
    ValueError or TypeError naming the argument whose shape, dtype or device does not fit; second derivatives raise
    RuntimeError where the kernel runs.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    arguments.check_optional_tensors(key_mask=key_mask)
    q, k, v = backend.autocast(q, k, v)
    checks.check_flash_attention(q, k, v, key_mask)
    factor: float = q.shape[3] ** -0.5 if scale is None else scale
    arguments.check_numbers(scale=factor)
    if not 0 < factor < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    if not _runs_kernel(q, q.shape[3]):
        return reference.flash_attention(q, k, v, key_mask, factor)
    out, _ = _flash_forward(q, k, v, key_mask, factor)
    return out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute torch's function of this name, through `flash_attention` where that gives the same; otherwise by torch's
    own.

    The kernel takes (B, H, L, D) tensors of one dtype with D ≤ 128, without dropout or causality, and no mask or a
    boolean one that is the same for all heads and queries: (B or 1, 1, 1, S). Raises ValueError or TypeError naming the
    argument whose shape, dtype or device does not fit.
    """
    arguments.check_tensors(query=query, key=key, value=value)
    arguments.check_optional_tensors(attn_mask=attn_mask)
    arguments.check_numbers(dropout_p=dropout_p, scale=1.0 if scale is None else scale)
    arguments.check_bools(is_causal=is_causal, enable_gqa=enable_gqa)
    plain = (scale is None or 0 < scale < math.inf) and not dropout_p and not is_causal
    if plain and checks.kernel_takes(query, key, value) and checks.is_key_mask(attn_mask, key):
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(key.shape[0], -1)
        return flash_attention(query, key, value, key_mask=key_mask, scale=scale)
    query, key, value = backend.autocast(query, key, value)
    checks.check_torch_arguments(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@define(
    "self_cross_attention_forward(Tensor qkv, Tensor context_kv, Tensor? key_mask, int num_heads) -> (Tensor, Tensor)"
)
def _self_cross_forward(
    qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The output, in the memory order of qkv, and both log₂-sum-exps of each query's logits, float32 (2, B, H, L)."""
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty_like(qkv[:, :, :channels])
    lse = torch.empty((2, batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    if not backend.shapes_only(qkv):
        launch.self_cross_forward(qkv, context_kv, key_mask, out, lse, num_heads)
    return out, lse


@define(
    "self_cross_attention_backward(Tensor grad, Tensor qkv, Tensor context_kv, Tensor? key_mask, Tensor out, "
    "Tensor lse, int num_heads) -> (Tensor, Tensor)"
)
def _self_cross_backward(
    grad: Tensor, qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    dqkv, dcontext = torch.empty_like(qkv), torch.empty_like(context_kv)
    if not backend.shapes_only(qkv):
        launch.self_cross_backward(grad, qkv, context_kv, key_mask, out, lse, num_heads, dqkv, dcontext)
    return dqkv, dcontext


class _SelfCrossAttention(Derivative):
    instead = FORWARD_MODE

    @staticmethod
    def forward(ctx, qkv, context_kv, key_mask, num_heads):
        out, lse = below_autograd(_self_cross_forward, qkv, context_kv, key_mask, num_heads)
        ctx.save_for_backward(qkv, context_kv, key_mask, out, lse)
        ctx.num_heads = num_heads
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 4
        return (*_self_cross_backward(grad, *ctx.saved_tensors, ctx.num_heads), None, None)


register_derivative(_self_cross_forward, _SelfCrossAttention.apply)


def self_cross_attention(
    qkv: Tensor, context_kv: Tensor | None = None, *, num_heads: int, key_mask: Tensor | None = None
) -> Tensor:
    """Compute softmax(q kᵀ/√D) v + softmax(q k_cᵀ/√D) v_c: the attention layer of Matryoshka Diffusion's UNet.

    qkv (B, L, 3C): channels hold q, k, v, each (num_heads, D); context_kv (B, S, 2C): k_c, v_c; any strides, so that
    the result of a 1×1 convolution in either memory format needs no copy; float16, bfloat16 or float32 (float64 on
    the "torch" backend); key_mask (B, S) bool, True = attend, for the context alone: a row of it without any True makes
    the second term 0. → (B, L, C) in qkv's dtype and memory order. Under autocast the inputs are cast. Heads more than
    128 wide run the reference on every device; so does float32 on NVIDIA's, unless the backend is "triton". Raises
    ValueError or TypeError naming the argument whose shape, dtype or device does not fit; second derivatives raise
    RuntimeError where the kernel runs.
    """
    arguments.check_tensors(qkv=qkv)
    arguments.check_optional_tensors(context_kv=context_kv, key_mask=key_mask)
    qkv, context_kv = backend.autocast(qkv, context_kv)
    checks.check_self_cross_attention(qkv, context_kv, num_heads, key_mask)
    if not _runs_kernel(qkv, qkv.shape[2] // (3 * num_heads)):
        return reference.self_cross_attention(qkv, context_kv, num_heads, key_mask)
    if context_kv is None:
        context_kv = qkv.new_zeros(qkv.shape[0], 0, 2 * qkv.shape[2] // 3)  # a context of no tokens adds nothing
    out, _ = _self_cross_forward(qkv, context_kv, key_mask, num_heads)
    return out
