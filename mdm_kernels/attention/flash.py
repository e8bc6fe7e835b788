"""flash_attention: softmax(q kᵀ) v without the L × S matrix in memory (Dao et al., arXiv 2205.14135, 2307.08691)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_kernels import arguments, backend
from mdm_kernels.attention import checks, reference, tiling
from mdm_kernels.library import Derivative, below_autograd, define, register_derivative


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, heads, tokens, head width)")
    batch, heads, _, width = q.shape
    keys = k.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, heads, keys, width):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} and k {tuple(k.shape)} it must be "
                f"(batch, heads, number of keys, head width) = {(batch, heads, keys, width)}"
            )
    checks.check_alike(q=q, k=k, v=v)
    checks.check_head_width(width, "q", q.shape)
    if key_mask is not None:
        checks.check_key_mask(key_mask, k=k)


@define(
    "flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> (Tensor, Tensor)"
)
def _forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output, in the memory order of q, and the log₂-sum-exp of each query's logits, float32 (B, H, L)."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if backend.shapes_only(q):
        return out, lse
    from mdm_kernels.attention.flash_kernels import flash_forward

    options = tiling.forward_tiles(q.element_size(), batch * heads * queries)
    backend.launch(
        flash_forward,
        (tiling.count(queries, options["BLOCK_M"]) * batch * heads,),
        *(q, k, v, key_mask, out, lse),
        *(*q.stride(), *k.stride(), *v.stride(), *checks.mask_strides(key_mask), *out.stride()),
        *(heads, queries, keys, scale),
        **tiling.width_constants(width),
        EVEN=keys % options["BLOCK_N"] == 0,
        MASKED=key_mask is not None,
        **options,
    )
    return out, lse


@define(
    "flash_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, Tensor lse, "
    "float scale) -> (Tensor, Tensor, Tensor)"
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if backend.shapes_only(q):
        return dq, dk, dv
    from mdm_kernels.attention.flash_kernels import flash_key_gradient, flash_query_gradient

    delta = torch.empty_like(lse)
    inputs = (*q.stride(), *k.stride(), *v.stride(), *checks.mask_strides(key_mask))
    sizes = (heads, queries, keys, scale)
    constants = tiling.width_constants(width) | {"MASKED": key_mask is not None}
    options = tiling.query_tiles(q.element_size(), batch * heads * queries)
    backend.launch(
        flash_query_gradient,
        (tiling.count(queries, options["BLOCK_M"]) * batch * heads,),
        *(q, k, v, key_mask, out, grad, lse, delta, dq),
        *(*inputs, *out.stride(), *grad.stride(), *dq.stride(), *sizes),
        EVEN=keys % options["BLOCK_N"] == 0,
        **constants,
        **options,
    )
    options = tiling.key_tiles(width, q.element_size())
    backend.launch(
        flash_key_gradient,
        (tiling.count(keys, options["BLOCK_N"]) * batch * heads,),
        *(q, k, v, key_mask, grad, lse, delta, dk, dv),
        *(*inputs, *grad.stride(), *dk.stride(), *dv.stride(), *sizes),
        EVEN=queries % options["BLOCK_M"] == 0,
        **constants,
        **options,
    )
    return dq, dk, dv


class _FlashAttention(Derivative):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, scale):
        out, lse = below_autograd(_forward, q, k, v, key_mask, scale)
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


register_derivative(_forward, _FlashAttention.apply)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v with accumulation in float32, in O(L) memory.

    q (B, H, L, D), k and v (B, H, S, D), any strides, float16, bfloat16 or float32 (float64 on the "torch" backend);
    key_mask (B, S) bool, True = attend; scale > 0, 1/√D unless given. → (B, H, L, D) in q's dtype and memory order. A
    row that may attend to no key gives 0 and passes no gradient on. Under autocast the inputs are cast. Heads more than
    128 wide run the reference on every device. Raises ValueError or TypeError naming the argument whose shape, dtype or
    device does not fit; second derivatives raise RuntimeError where the kernel runs.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    arguments.check_optional_tensors(key_mask=key_mask)
    q, k, v = backend.autocast(q, k, v)
    _check(q, k, v, key_mask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    arguments.check_numbers(scale=scale)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if q.shape[3] > checks.MAX_HEAD_WIDTH or not backend.runs_triton(q):
        return reference.flash_attention(q, k, v, key_mask, scale)
    out, _ = _forward(q, k, v, key_mask, scale)
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
    """torch's function of this name, through `flash_attention` where that computes the same; otherwise torch's own.

    The kernel takes (B, H, L, D) tensors of one dtype with D ≤ 128, without dropout or causality, and no mask or a
    boolean one that is the same for all heads and queries: (B or 1, 1, 1, S). Raises ValueError or TypeError naming the
    argument whose shape, dtype or device does not fit.
    """
    arguments.check_tensors(query=query, key=key, value=value)
    arguments.check_optional_tensors(attn_mask=attn_mask)
    arguments.check_numbers(dropout_p=dropout_p, scale=1.0 if scale is None else scale)
    arguments.check_bools(is_causal=is_causal, enable_gqa=enable_gqa)
    positive = scale is None or scale > 0
    if positive and not dropout_p and not is_causal and _fits(query, key, value) and _is_key_mask(attn_mask, key):
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(key.shape[0], -1)
        return flash_attention(query, key, value, key_mask=key_mask, scale=scale)
    query, key, value = backend.autocast(query, key, value)
    checks.check_torch_arguments(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.dim() == key.dim() == 4
        and key.shape == value.shape
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3] <= checks.MAX_HEAD_WIDTH
        and query.dtype in checks.DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )


def _is_key_mask(mask: Tensor | None, key: Tensor) -> bool:
    if mask is None:
        return True
    return (
        mask.dim() == 4
        and mask.dtype == torch.bool
        and mask.device == key.device
        and mask.shape[0] in (1, key.shape[0])
        and mask.shape[1:] == (1, 1, key.shape[2])
    )
