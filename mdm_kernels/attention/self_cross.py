"""self_cross_attention: image tokens attend to each other and, in a softmax of its own, to the text; in one kernel."""

from torch import Tensor

from mdm_kernels import backend
from mdm_kernels.attention import checks, reference


def _check(qkv: Tensor, context_kv: Tensor | None, num_heads: int, key_mask: Tensor | None) -> None:
    head_width = checks.split_heads("qkv", qkv, 3, num_heads)
    if context_kv is None:
        checks.check_alike(qkv=qkv)
        if key_mask is not None:
            raise ValueError(f"key_mask has shape {tuple(key_mask.shape)} but there is no context_kv that it could mask")
        return
    batch, width = qkv.shape[0], 2 * num_heads * head_width
    if context_kv.dim() != 3 or context_kv.shape[0] != batch or context_kv.shape[2] != width:
        raise ValueError(
            f"context_kv has shape {tuple(context_kv.shape)}; with qkv {tuple(qkv.shape)} it must be "
            f"(batch, context tokens, 2C) = ({batch}, any, {width})"
        )
    checks.check_alike(qkv=qkv, context_kv=context_kv)
    if key_mask is not None:
        checks.check_key_mask(key_mask, batch, context_kv.shape[1], qkv.device)


def self_cross_attention(
    qkv: Tensor, context_kv: Tensor | None = None, *, num_heads: int, key_mask: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ/√D) v + softmax(q k_cᵀ/√D) v_c: the attention layer of Matryoshka Diffusion's UNet.

    qkv (B, L, 3C): channels hold q, k, v, each (num_heads, D); context_kv (B, S, 2C): k_c, v_c; any strides, so that
    the result of a 1×1 convolution in either memory format needs no copy; float16, bfloat16 or float32 (float64 on
    the "torch" backend), D ≤ 128; key_mask (B, S) bool, True = attend, for the context alone: a row of it without any
    True makes the second term 0. → (B, L, C) in qkv's dtype and memory order. Under autocast the inputs are cast.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device does not fit.
    """
    qkv, context_kv = backend.autocast(qkv, context_kv)
    _check(qkv, context_kv, num_heads, key_mask)
    return reference.self_cross_attention(qkv, context_kv, num_heads, key_mask)
