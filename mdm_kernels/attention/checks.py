"""What the attention ops ask of their arguments; every error names the argument, what it is and what it must be."""

import torch
from torch import Tensor

from .. import arguments, backend

MAX_HEAD_WIDTH = 128  # of the kernels; the references take any
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels; the references take float64 too


def check_alike(**tensors: Tensor) -> None:
    """Check that all tensors have the first one's dtype (else TypeError) and device (else ValueError), and a dtype that
    the chosen backend computes in (else TypeError)."""
    (first_name, first), *others = tensors.items()
    on_triton = backend.chooses_triton(first)
    if first.dtype not in DTYPES and (on_triton or first.dtype != torch.float64):
        allowed = "float16, bfloat16 or float32" + ("" if on_triton else ", or float64")
        raise TypeError(f"{first_name} has dtype {first.dtype}; it must be {allowed}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {first_name}'s, {first.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {first_name}'s device, {first.device}")


def check_head_width(head_width: int, name: str, shape: torch.Size) -> None:
    """Raise ValueError, which calls the tensor of this shape `name`, unless heads are at least 1 wide."""
    if head_width < 1:
        raise ValueError(f"{name} has shape {tuple(shape)}, heads {head_width} wide; they must be at least 1 wide")


def check_key_mask(key_mask: Tensor, **keys: Tensor) -> None:
    """Raise TypeError unless `key_mask` is boolean, ValueError unless, (batch, tokens), it fits the one tensor `keys`
    (batch, …, tokens, channels) and is on its device."""
    ((name, tensor),) = keys.items()
    expected = tensor.shape[0], tensor.shape[-2]
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask has dtype {key_mask.dtype}; it must be torch.bool, True where a key is attended to")
    if key_mask.shape != expected:
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; with {name} {tuple(tensor.shape)} it must be "
            f"(batch, number of keys) = {expected}"
        )
    if key_mask.device != tensor.device:
        raise ValueError(f"key_mask is on {key_mask.device}; it must be on {name}'s device, {tensor.device}")


def split_heads(name: str, x: Tensor, parts: int, num_heads: int) -> int:
    """Give the head width D of x (batch, tokens, parts · num_heads · D). Raises ValueError if x has no such shape."""
    arguments.check_ints(num_heads=num_heads)
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, tokens, channels)")
    if num_heads < 1 or x.shape[2] % (parts * num_heads):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; its last size must be a multiple of {parts} · num_heads, "
            f"with num_heads = {num_heads}"
        )
    head_width = x.shape[2] // (parts * num_heads)
    check_head_width(head_width, name, x.shape)
    return head_width


def check_flash_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Raise ValueError or TypeError unless q (B, H, L, D), k and v (B, H, S, D) and key_mask (B, S) are what
    `flash_attention` takes."""
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
    check_alike(q=q, k=k, v=v)
    check_head_width(width, "q", q.shape)
    if key_mask is not None:
        check_key_mask(key_mask, k=k)


def check_self_cross_attention(qkv: Tensor, context_kv: Tensor | None, num_heads: int, key_mask: Tensor | None) -> None:
    """Raise ValueError or TypeError unless qkv (B, L, 3C), context_kv (B, S, 2C) and key_mask (B, S) are what
    `self_cross_attention` takes."""
    head_width = split_heads("qkv", qkv, 3, num_heads)
    if context_kv is None:
        check_alike(qkv=qkv)
        if key_mask is not None:
            raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; without context_kv it must be None")
        return
    batch, width = qkv.shape[0], 2 * num_heads * head_width
    if context_kv.dim() != 3 or context_kv.shape[0] != batch or context_kv.shape[2] != width:
        raise ValueError(
            f"context_kv has shape {tuple(context_kv.shape)}; with qkv {tuple(qkv.shape)} it must be "
            f"(batch, context tokens, 2C) = ({batch}, any, {width})"
        )
    check_alike(qkv=qkv, context_kv=context_kv)
    if key_mask is not None:
        check_key_mask(key_mask, context_kv=context_kv)


def check_torch_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, gqa: bool
) -> None:
    """Raise ValueError or TypeError where shapes, dtypes or devices are not what torch's scaled_dot_product_attention
    takes.

    torch's own errors are of several types and often do not say which argument is meant.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        shape = f"{name} has shape {tuple(x.shape)}"
        if x.dim() < 2 + gqa:
            raise ValueError(f"{shape}; it must be (..., {'heads, ' if gqa else ''}tokens, head width)")
        if gqa and (x.shape[-3] == 0 or query.shape[-3] % x.shape[-3]):
            raise ValueError(f"{shape}; with enable_gqa its heads must divide those of query {tuple(query.shape)}")
        if x.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be query's, {query.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}; it must be on query's device, {query.device}")
    sizes = f"with query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2]:
        raise ValueError(f"query and key must have one head width, key and value as many tokens; not so {sizes}")
    leading = [x.shape[: -2 - gqa] + query.shape[-3:-2] * gqa for x in (query, key, value)]
    batch = _broadcast(f"the leading sizes must broadcast; they do not {sizes}", *leading)
    logits = (*batch, query.shape[-2], key.shape[-2])
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in 0…1")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask and is_causal exclude each other; give one of them")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; it must be torch.bool, torch.float32 or query's")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}; it must be on query's device, {query.device}")
    rule = f"attn_mask has shape {tuple(attn_mask.shape)}; it must broadcast to {logits}, {sizes}"
    if attn_mask.dim() < 2 or _broadcast(rule, attn_mask.shape, logits) != logits:
        raise ValueError(rule)


def _broadcast(rule: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(rule) from None


def kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `flash_attention` computes scaled_dot_product_attention of these."""
    return (
        query.dim() == key.dim() == 4
        and key.shape == value.shape
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3] <= MAX_HEAD_WIDTH
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )


def is_key_mask(mask: Tensor | None, key: Tensor) -> bool:
    """Whether the mask is one that `flash_attention` takes: None, or boolean and the same for all heads and queries."""
    if mask is None:
        return True
    return (
        mask.dim() == 4
        and mask.dtype == torch.bool
        and mask.device == key.device
        and mask.shape[0] in (1, key.shape[0])
        and mask.shape[1:] == (1, 1, key.shape[2])
    )
