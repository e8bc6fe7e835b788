"""Tiles of keys and values that come by TMA: an experiment that the environment variable MDM_KERNELS_TMA=1 turns on.

A GPU of Hopper's kind or newer copies a tile by one instruction of one thread, from a descriptor of the tensor: its
address, shape and strides. What lies beyond the shape arrives as zeros. Triton makes the descriptor on the host at each
launch and hands it over by value, as it does an address: a captured CUDA graph keeps both.

The loops over keys have it, of the output and of the gradient of q. The loop over queries, for the gradients of k and
v, has not: 96 channels wide it spilled on sm_100 (2 registers) and sm_120 (42).
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from . import arguments, plans

ALIGNMENT = 16  # bytes, of an address and of all strides but the last, which is one element

_tma = os.environ.get("MDM_KERNELS_TMA", "0")
arguments.check_choice("MDM_KERNELS_TMA", _tma, ("0", "1"))


@contextlib.contextmanager
def by_tma(choice: str = "1") -> Iterator[None]:
    """Inside the block, tiles of keys and values are read by TMA where that can be ("1"), or not ("0")."""
    global _tma
    before, _tma = _tma, choice
    plans.forget()
    try:
        yield
    finally:
        _tma = before
        plans.forget()


def descriptors(rows: int, head_width: int, columns: tuple[int, int], **tensors: Tensor) -> dict:
    """Give the kernel arguments {"k_tiles": …, "k_rest": …}: for each tensor, (B, H, L, D) or (B, L, H·D), descriptors
    of tiles of one head's `rows` tokens by columns[0] of its channels, and by columns[1]; None where columns[1] is 0,
    and where TMA cannot read the tensor."""
    found = {}
    for name, x in tensors.items():
        heads = x if x.dim() == 4 else x.unflatten(2, (-1, head_width)).transpose(1, 2)
        for part, width in zip(("tiles", "rest"), columns, strict=True):
            found[f"{name}_{part}"] = _descriptor(x, heads, [1, 1, rows, width]) if width and _reads(heads) else None
    return found


def _descriptor(x: Tensor, heads: Tensor, tile: list[int]):
    """Of x, which `plans` knows, seen as `heads`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(heads.shape), list(heads.stride()), tile)


def _reads(x: Tensor) -> bool:
    """Whether it is asked for, the GPU has it, and the tensor is one that it takes; of 16 bits, as products of float32
    have no matrix units to feed."""
    return (
        _tma == "1"
        and _has_tma(x.device)
        and x.itemsize == 2
        and x.numel() > 0
        and x.data_ptr() % ALIGNMENT == 0
        and x.stride(-1) == 1
        and all(stride > 0 and stride * x.itemsize % ALIGNMENT == 0 for stride in x.stride()[:-1])
    )


def _has_tma(device: torch.device) -> bool:
    """What is interpreted, or only recorded, counts as Hopper."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0))
