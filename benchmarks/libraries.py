"""What other libraries offer for our ops, each imported where it is first called: one that is missing raises there."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def group_norm_silu(num_groups: int, channels: int) -> dict[str, Callable]:
    """List other libraries' functions of (x, weight, bias), by name. The modules are made once; their own parameters
    are never used."""

    @functools.cache
    def apex_module(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from apex.contrib.group_norm import GroupNorm  # pyright: ignore[reportMissingImports]: an optional rival

        if channels not in GroupNorm.SUPPORTED_CHANNELS:
            raise NotImplementedError(f"apex leaves {channels} channels to PyTorch")
        return GroupNorm(num_groups, channels, device=device, dtype=dtype, act="silu")

    @functools.cache
    def liger_module() -> nn.Module:
        from liger_kernel.transformers.group_norm import LigerGroupNorm  # pyright: ignore[reportMissingImports]: an optional rival

        return LigerGroupNorm(channels, num_groups, eps=1e-5)

    def apex(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(apex_module(x.device, x.dtype), {"weight": weight, "bias": bias}, (x,))

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(functional_call(liger_module(), {"weight": weight, "bias": bias}, (x,)))

    return {"apex": apex, "Liger": liger}


def flash_attention() -> dict[str, Callable]:
    """List other libraries' functions of (q, k, v), each (B, H, L, D), by name."""

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]: an optional rival

        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return {"xformers": xformers}


def self_cross_attention(num_heads: int) -> dict[str, Callable]:
    """List other libraries' functions of (qkv, context_kv) as in `mdm_kernels.self_cross_attention`, by name."""

    def xformers(qkv: Tensor, context_kv: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]: an optional rival

        q, k, v = (part.unflatten(2, (num_heads, -1)) for part in qkv.chunk(3, dim=2))
        text_k, text_v = (part.unflatten(2, (num_heads, -1)) for part in context_kv.chunk(2, dim=2))
        return (memory_efficient_attention(q, k, v) + memory_efficient_attention(q, text_k, text_v)).flatten(2)

    return {"xformers": xformers}
