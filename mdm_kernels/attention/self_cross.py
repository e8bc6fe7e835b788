"""self_cross_attention: image tokens attend to each other and, in a softmax of its own, to the text; in one kernel."""

import torch
from torch import Tensor

from mdm_kernels import arguments, backend
from mdm_kernels.attention import checks, reference, tiling
from mdm_kernels.library import Derivative, below_autograd, define, register_derivative


def _check(qkv: Tensor, context_kv: Tensor | None, num_heads: int, key_mask: Tensor | None) -> None:
    head_width = checks.split_heads("qkv", qkv, 3, num_heads)
    if context_kv is None:
        checks.check_alike(qkv=qkv)
        if key_mask is not None:
            raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; without context_kv it must be None")
        return
    batch, width = qkv.shape[0], 2 * num_heads * head_width
    if context_kv.dim() != 3 or context_kv.shape[0] != batch or context_kv.shape[2] != width:
        raise ValueError(
            f"context_kv has shape {tuple(context_kv.shape)}; with qkv {tuple(qkv.shape)} it must be "
            f"(batch, context tokens, 2C) = ({batch}, any, {width})"
        )
    checks.check_alike(qkv=qkv, context_kv=context_kv)
    if key_mask is not None:
        checks.check_key_mask(key_mask, context_kv=context_kv)


@define(
    "self_cross_attention_forward(Tensor qkv, Tensor context_kv, Tensor? key_mask, int num_heads) -> (Tensor, Tensor)"
)
def _forward(qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """The output, in the memory order of qkv, and both log₂-sum-exps of each query's logits, float32 (2, B, H, L)."""
    batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    width, context_tokens = channels // num_heads, context_kv.shape[1]
    out = torch.empty_like(qkv[:, :, :channels])
    lse = torch.empty((2, batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    if backend.shapes_only(qkv):
        return out, lse
    from mdm_kernels.attention.self_cross_kernels import self_cross_forward

    options = tiling.forward_tiles(qkv.element_size(), batch * num_heads * tokens)
    context_tile = tiling.context_tile(options["BLOCK_M"])
    backend.launch(
        self_cross_forward,
        (tiling.count(tokens, options["BLOCK_M"]) * batch * num_heads,),
        *(qkv, context_kv, key_mask, out, lse),
        *(*qkv.stride(), *context_kv.stride(), *checks.mask_strides(key_mask), *out.stride()),
        *(batch, num_heads, tokens, context_tokens, width**-0.5),
        **tiling.width_constants(width),
        EVEN=tokens % options["BLOCK_N"] == 0,
        BLOCK_CONTEXT=context_tile,
        EVEN_CONTEXT=context_tokens % context_tile == 0,
        MASKED=key_mask is not None,
        **options,
    )
    return out, lse


@define(
    "self_cross_attention_backward(Tensor grad, Tensor qkv, Tensor context_kv, Tensor? key_mask, Tensor out, "
    "Tensor lse, int num_heads) -> (Tensor, Tensor)"
)
def _backward(
    grad: Tensor, qkv: Tensor, context_kv: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = out.shape
    width, context_tokens = channels // num_heads, context_kv.shape[1]
    dqkv, dcontext = torch.empty_like(qkv), torch.empty_like(context_kv)
    if backend.shapes_only(qkv):
        return dqkv, dcontext
    from mdm_kernels.attention.self_cross_kernels import self_cross_key_gradient, self_cross_query_gradient

    delta = torch.empty_like(lse)
    inputs = (*qkv.stride(), *context_kv.stride(), *checks.mask_strides(key_mask))
    sizes = (batch, num_heads, tokens, context_tokens, width**-0.5)
    constants = tiling.width_constants(width) | {"MASKED": key_mask is not None}
    options = tiling.query_tiles(qkv.element_size(), batch * num_heads * tokens)
    backend.launch(
        self_cross_query_gradient,
        (tiling.count(tokens, options["BLOCK_M"]) * batch * num_heads,),
        *(qkv, context_kv, key_mask, out, grad, lse, delta, dqkv),
        *(*inputs, *out.stride(), *grad.stride(), *dqkv.stride(), *sizes),
        EVEN=tokens % options["BLOCK_N"] == 0,
        EVEN_CONTEXT=context_tokens % options["BLOCK_N"] == 0,
        **constants,
        **options,
    )
    options = tiling.key_tiles(width, qkv.element_size())
    key_tiles = tiling.count(tokens, options["BLOCK_N"]) + tiling.count(context_tokens, options["BLOCK_N"])
    backend.launch(
        self_cross_key_gradient,
        (key_tiles * batch * num_heads,),
        *(qkv, context_kv, key_mask, grad, lse, delta, dqkv, dcontext),
        *(*inputs, *grad.stride(), *dqkv.stride(), *dcontext.stride(), *sizes),
        EVEN=tokens % options["BLOCK_M"] == 0,
        **constants,
        **options,
    )
    return dqkv, dcontext


class _SelfCrossAttention(Derivative):
    @staticmethod
    def forward(ctx, qkv, context_kv, key_mask, num_heads):
        out, lse = below_autograd(_forward, qkv, context_kv, key_mask, num_heads)
        ctx.save_for_backward(qkv, context_kv, key_mask, out, lse)
        ctx.num_heads = num_heads
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 4
        return (*_backward(grad, *ctx.saved_tensors, ctx.num_heads), None, None)


register_derivative(_forward, _SelfCrossAttention.apply)


def self_cross_attention(
    qkv: Tensor, context_kv: Tensor | None = None, *, num_heads: int, key_mask: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ/√D) v + softmax(q k_cᵀ/√D) v_c: the attention layer of Matryoshka Diffusion's UNet.

    qkv (B, L, 3C): channels hold q, k, v, each (num_heads, D); context_kv (B, S, 2C): k_c, v_c; any strides, so that
    the result of a 1×1 convolution in either memory format needs no copy; float16, bfloat16 or float32 (float64 on
    the "torch" backend); key_mask (B, S) bool, True = attend, for the context alone: a row of it without any True makes
    the second term 0. → (B, L, C) in qkv's dtype and memory order. Under autocast the inputs are cast. Heads more than
    128 wide run the reference on every device. Raises ValueError or TypeError naming the argument whose shape, dtype or
    device does not fit; second derivatives raise RuntimeError where the kernel runs.
    """
    arguments.check_tensors(qkv=qkv)
    arguments.check_optional_tensors(context_kv=context_kv, key_mask=key_mask)
    qkv, context_kv = backend.autocast(qkv, context_kv)
    _check(qkv, context_kv, num_heads, key_mask)
    if qkv.shape[2] // (3 * num_heads) > checks.MAX_HEAD_WIDTH or not backend.runs_triton(qkv):
        return reference.self_cross_attention(qkv, context_kv, num_heads, key_mask)
    if context_kv is None:
        context_kv = qkv.new_zeros(qkv.shape[0], 0, 2 * qkv.shape[2] // 3)  # a context of no tokens adds nothing
    out, _ = _forward(qkv, context_kv, key_mask, num_heads)
    return out
