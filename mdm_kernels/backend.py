"""Which implementation of an op runs, and how a Triton kernel is launched.

`auto` runs the Triton kernels on CUDA and ROCm tensors, but for those that PyTorch is known to be faster than, and the
PyTorch reference on CPU tensors. `triton` on CPU
tensors works under TRITON_INTERPRET=1 only; `torch` is the reference everywhere. The environment variable
MDM_KERNELS_BACKEND says which one a process starts with; `set_backend` and `use_backend` change it.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from . import arguments, private_torch

BACKENDS = ("auto", "triton", "torch")

# Module globals, not context variables: autograd recomputes checkpointed layers in threads of its own, which must see
# the same choice, and torch.compile guards on a global where it cannot trace a context variable (torch 2.11).
_backend = os.environ.get("MDM_KERNELS_BACKEND", "auto")
arguments.check_choice("MDM_KERNELS_BACKEND", _backend, BACKENDS)
_recorder: Callable | None = None
_ran: "Ran | None" = None
_launches_on_cpu = os.environ.get("TRITON_INTERPRET", "0") == "1"
_noted = threading.local()
_HERE = contextlib.nullcontext()


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process: "auto", "triton" or "torch"; ValueError or TypeError for
    another."""
    global _backend
    arguments.check_choice("backend", name, BACKENDS)
    _backend = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation, as `set_backend` does, for the whole process until the end of a `with` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def runs_triton(x: Tensor, *, fits: bool = True, faster: bool = True) -> bool:
    """Say, once a call, whether an op called on `x` runs its Triton kernels (True) or its PyTorch reference (False). It
    runs them only if the call `fits` them, and by "auto" only if they are `faster` on a GPU."""
    runs = fits and chooses_triton(x, faster)
    if _ran is not None and not runs:
        _ran.references[str(x.device)] += 1
    return runs


def chooses_triton(x: Tensor, faster: bool = True) -> bool:
    """Say which an op that has kernels for the call would run, without `what_ran` counting one."""
    if _backend == "auto":
        return x.device.type == "cuda" and faster  # ROCm devices are "cuda" in torch too
    if _backend == "triton" and x.device.type == "cpu" and _recorder is None and not _launches_on_cpu:
        raise RuntimeError("backend 'triton' on a CPU tensor needs TRITON_INTERPRET=1 set before triton is imported")
    return _backend == "triton"


@contextlib.contextmanager
def launching_on_cpu() -> Iterator[None]:
    """Inside the block kernels may be launched on CPU tensors without Triton's interpreter: what stands in for a GPU,
    such as a sanitizer, has replaced the launch."""
    global _launches_on_cpu
    before, _launches_on_cpu = _launches_on_cpu, True
    try:
        yield
    finally:
        _launches_on_cpu = before


def shapes_only(x: Tensor) -> bool:
    """Whether only the shapes of an op's results are wanted: a fake or meta tensor, outside `recording`."""
    return private_torch.is_fake(x) or (x.device.type == "meta" and _recorder is None)


@overload
def autocast(*tensors: Tensor) -> tuple[Tensor, ...]: ...
@overload
def autocast(first: Tensor, second: Tensor | None, /) -> tuple[Tensor, Tensor | None]: ...
def autocast(*tensors: Tensor | None) -> Any:
    """Give the tensors in the autocast dtype where autocast is on for their device; float64, what is no floating-point
    number, and None stay as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # a meta device has no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple([t.to(dtype) if t is not None and _is_cast(t) else t for t in tensors])


def _is_cast(x: Tensor) -> bool:
    """Whether autocast converts such a tensor."""
    return x.is_floating_point() and x.dtype != torch.float64


def launch(kernel, grid: tuple[int, ...], /, **arguments) -> None:
    """Run `kernel[grid](**arguments)` on the device of its first tensor; nothing runs on an empty grid.

    arguments: the kernel's, by name, and Triton's num_warps and num_stages.
    """
    arguments.setdefault("enable_fp_fusion", True)  # a * b + c in one instruction: off by default from Triton 3.10
    if _recorder is not None:
        _recorder(kernel, arguments)
    elif 0 not in grid:
        arguments = wavefront_options(arguments) if torch.version.hip else arguments
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        count_launch(kernel, device)
        with on_device(device):
            compiled = kernel[grid](**arguments)
        if note := getattr(_noted, "note", None):
            note(kernel, grid, arguments, compiled)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Give a context in which kernels are launched on that device: the GPU's own, if that is not the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE  # entering it costs microseconds


@contextlib.contextmanager
def noting(note: Callable[..., None]) -> Iterator[None]:
    """Inside the block each launch of this thread also calls `note(kernel, grid, arguments, compiled)`, with what
    Triton compiled, None under its interpreter."""
    _noted.note = note
    try:
        yield
    finally:
        del _noted.note


@dataclass
class Ran:
    """What ran where, for `print`: launches of each kernel on each device, and calls that a reference computed."""

    kernels: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    references: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        lines = [f"{count:6}  {name} on {device}" for (name, device), count in sorted(self.kernels.items())]
        lines += [f"{count:6}  PyTorch references on {device}" for device, count in sorted(self.references.items())]
        return "\n".join(lines) or "nothing of mdm_kernels ran"


def count_launch(kernel, device: torch.device) -> None:
    """Count a launch of a kernel on a device while `what_ran` runs."""
    if _ran is not None:
        _ran.kernels[kernel.fn.__name__, str(device)] += 1


@contextlib.contextmanager
def what_ran() -> Iterator[Ran]:
    """Count, until the end of a `with` block, which kernels ran on which device, and how often a reference did instead.

    Calls that do not come to this package while the block runs are not counted: the replay of a CUDA graph, and what a
    function compiled before decided then.
    """
    global _ran
    before, _ran = _ran, Ran()
    try:
        yield _ran
    finally:
        _ran = before


def wavefront_options(arguments: dict) -> dict:
    """Give the arguments of a launch on AMD: as many threads, in wavefronts of 64, and at most two stages of prefetched
    tiles, which are held in registers there. `mdm_kernels.aot` compiles for AMD with the same."""
    num_warps, num_stages = arguments.get("num_warps", 4), arguments.get("num_stages", 2)
    return arguments | {"num_warps": max(1, num_warps // 2), "num_stages": min(2, num_stages)}


@contextlib.contextmanager
def recording(record: Callable[[object, dict], None]) -> Iterator[None]:
    """Inside the block a launch calls `record(kernel, arguments)` instead of running: how `mdm_kernels.aot` learns
    from meta tensors exactly what an op would launch."""
    global _recorder
    _recorder = record
    try:
        yield
    finally:
        _recorder = None


def is_recording() -> bool:
    """Whether the code runs inside `recording`."""
    return _recorder is not None
