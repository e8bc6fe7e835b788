"""Attention in plain PyTorch: what the kernels must compute, and what runs on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = torch.float16, torch.bfloat16
SHORT = 2**16
"""queries times keys up to which torch's attention with a derivative is faster on a CPU in float32 than in half
precision, casts included: at 64 queries and keys 2.3 times (torch 2.15, AVX-512 with bfloat16 products)"""


def flash_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None):
    """Compute softmax(scale · q kᵀ) v;  q (B, H, L, D), k and v (B, H, S, D) → (B, H, L, D) in q's dtype.

    key_mask (B, S), True = attend. A row that may attend to no key gives 0 and passes no gradient on.
    """
    if q.dtype in HALF and _is_short_and_differentiated(q, k, v):
        with torch.autocast("cpu", enabled=False):
            return flash_attention(q.float(), k.float(), v.float(), key_mask, scale).to(q.dtype)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    no_key = ~key_mask.any(dim=1)[:, None]  # (B, 1): such a row attends to every key and is then set to 0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(key_mask | no_key)[:, None, None, :], scale=scale)
    return out.masked_fill(no_key[:, :, None, None], 0.0)


def _is_short_and_differentiated(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > SHORT:
        return False
    return torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))


def self_cross_attention(qkv: Tensor, context_kv: Tensor | None, num_heads: int, key_mask: Tensor | None = None):
    """Compute softmax(q kᵀ/√d) v + softmax(q k_cᵀ/√d) v_c, the second sum over the context alone.

    qkv (B, L, 3C), context_kv (B, S, 2C), key_mask (B, S) for the context → (B, L, C) in qkv's dtype.
    """
    q, k, v = _heads(qkv, parts=3, num_heads=num_heads)
    out = flash_attention(q, k, v)
    if context_kv is not None:
        context_k, context_v = _heads(context_kv, parts=2, num_heads=num_heads)
        out = out + flash_attention(q, context_k, context_v, key_mask)
    return out.transpose(1, 2).flatten(2)


def _heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, L, parts·H·D) → `parts` views (B, H, L, D); the channels are made the fastest dimension if they are not."""
    if x.stride(2) != 1:
        x = x.contiguous()  # PyTorch's fused CPU attention needs unit stride
    return torch.unflatten(x, 2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
