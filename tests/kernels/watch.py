"""Every address that interpreted kernels read or write."""

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from mdm_kernels import backend


def span(x: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


class Watch:
    """Sees every address that interpreted kernels read or write."""

    def __init__(self):
        self.builder = interpreter.interpreter_builder
        self.launch, self.load, self.store = (
            backend.launch,
            self.builder.create_masked_load,
            self.builder.create_masked_store,
        )
        self.allowed: list[tuple[int, int]] = []
        self.written: dict[tuple, list[np.ndarray]] = {}  # by program

    def watched_launch(self, kernel, grid, **arguments) -> None:
        tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.numel()]
        self.allowed = [(x.data_ptr(), x.data_ptr() + x.itemsize * span(x)) for x in tensors]
        self.written = {}
        self.launch(kernel, grid, **arguments)
        by_program = [np.unique(np.concatenate(addresses)) for addresses in self.written.values()]
        if by_program:
            written = np.concatenate(by_program)
            assert len(np.unique(written)) == len(written), "two programs write the same element"

    def watched_load(self, pointers, mask, other, *options, **named):
        self.addresses(pointers, mask)
        assert other is not None or mask.data.all(), "a masked load says nothing of the elements that it leaves out"
        return self.load(pointers, mask, other, *options, **named)

    def watched_store(self, pointers, value, mask, *options):
        self.written.setdefault(tuple(self.builder.grid_idx), []).append(self.addresses(pointers, mask))
        return self.store(pointers, value, mask, *options)

    def addresses(self, pointers, mask) -> np.ndarray:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.uint64)
        inside = np.zeros(addresses.shape, bool)
        for first, end in self.allowed:
            inside |= (addresses >= first) & (addresses < end)
        assert inside.all(), "a kernel reads or writes outside its tensors"
        return addresses
