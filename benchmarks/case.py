"""What a benchmark of an op needs to know: a `Case`, one op at one shape."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where inputs are drawn, and in which dtype."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    inputs: Callable[[], tuple[Tensor, ...]]
    """draws fresh inputs"""
    ours: Callable | None
    """of the inputs; None where the question is whether to write a kernel at all"""
    plain: Callable
    """the same in plain PyTorch"""
    forward_bytes: int
    forward_operations: int
    backward_bytes: int = 0
    """0 if the op has no backward"""
    backward_operations: int = 0
    sample_dims: tuple[int | None, ...] = ()
    """of each input, the dimension that counts samples; None if all samples share it"""
    sample_rows: int = 1
    """rows that a sample has along that dimension: the frames of a clip"""
    differentiated: int | None = None
    """how many of the inputs, the first ones; None for all"""
    oracle: Callable | None = None
    """the definition, called with float64 inputs; None if results are random"""
    plain_is_random: bool = False
    """whether everybody else draws noise of their own, so that only ours can be compared with the oracle"""
    uses_sdpa: bool = False
    libraries: dict[str, Callable] = field(default_factory=dict)
    """further ways of computing it, by name"""
    experiments: dict[str, Callable[[], AbstractContextManager]] = field(default_factory=dict)
    """what ours is measured in besides, by name: contexts that turn on what is off until measured"""

    def operations(self, backward: bool) -> int:
        """Give the arithmetic operations of a call, with its backward pass or without."""
        return self.forward_operations + (self.backward_operations if backward else 0)

    def least_bytes(self, backward: bool) -> int:
        """Give the bytes that a call must at least read and write, with its backward pass or without."""
        return self.forward_bytes + (self.backward_bytes if backward else 0)
