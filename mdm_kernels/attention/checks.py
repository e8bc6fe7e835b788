"""What the attention ops ask of their arguments; every error names the argument, what it is and what it must be."""

import torch
from torch import Tensor

from mdm_kernels import arguments, backend

MAX_HEAD_WIDTH = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels; the references take float64 too


def check_alike(**tensors: Tensor) -> None:
    """All tensors have the first one's dtype and device, and a dtype that the chosen backend computes in."""
    (first_name, first), *others = tensors.items()
    on_triton = backend.runs_triton(first)
    if first.dtype not in DTYPES and (on_triton or first.dtype != torch.float64):
        allowed = "float16, bfloat16 or float32" + ("" if on_triton else ", or float64")
        raise TypeError(f"{first_name} has dtype {first.dtype}; it must be {allowed}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {first_name}'s, {first.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {first_name}'s device, {first.device}")


def check_head_width(head_width: int, name: str, shape: torch.Size) -> None:
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise ValueError(f"{name} has shape {tuple(shape)}, heads {head_width} wide; 1 to {MAX_HEAD_WIDTH} is possible")


def check_key_mask(key_mask: Tensor, batch: int, keys: int, device: torch.device) -> None:
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask has dtype {key_mask.dtype}; it must be torch.bool, True where a key is attended to")
    if key_mask.shape != (batch, keys):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; it must be (batch, number of keys) = {(batch, keys)}"
        )
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device}; it must be on {device} like the keys")


def split_heads(name: str, x: Tensor, parts: int, num_heads: int) -> int:
    """The head width D of x (batch, tokens, parts · num_heads · D)."""
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


def mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if key_mask is None else key_mask.stride()
