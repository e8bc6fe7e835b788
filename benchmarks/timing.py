"""Measures of one machine: time, peak memory, and the rates that the floors are computed from."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the repetitions."""

    median: float
    fastest: float
    slowest: float


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as info:
        models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


def time_side_by_side(
    calls: dict[str, Callable[[], object]], device: torch.device, *, seconds: float, at_least: int = 3
) -> dict[str, Timing]:
    """Time several ways of doing one thing in turn, so that a noisy machine disturbs all alike.

    Each is called at least `at_least` times and for about `seconds` in all, after one call that is not counted.
    """
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(spent.values()))) < at_least or time.perf_counter() - began < seconds * len(calls):
        for name, call in calls.items():
            spent[name].append(_time_once(call, device))
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in spent.items()}


def _time_once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call allocates at its peak, above what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _TensorMemory() as memory:
        call()
    return memory.peak


class _TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that ops return while they live; what an op allocates within it is not seen."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.held)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.held += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.held -= size


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, counting both, on a tensor well past the caches."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    timing = time_side_by_side({"copy": lambda: target.copy_(source)}, device, seconds=0.5, at_least=5)
    return 2 * source.numel() * source.element_size() / timing["copy"].median


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = time_side_by_side({"product": lambda: a @ b}, device, seconds=0.5, at_least=5)
    return 2 * size**3 / timing["product"].median


def rotating(inputs: list[tuple[Tensor, ...]], call: Callable[..., object]) -> Callable[[], object]:
    """A call that takes the next of several sets of inputs each time, so that none waits for it in a cache."""
    turn = 0

    def next_call() -> object:
        nonlocal turn
        turn += 1
        return call(*inputs[turn % len(inputs)])

    return next_call
