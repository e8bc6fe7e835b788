"""How long calls take, in turn and out of caches, and how much memory they need at their peak."""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Results = TypeVar("Results")


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the repetitions."""

    median: float
    fastest: float
    slowest: float

    def of_one_among(self, calls: int) -> "Timing":
        """Give the timing of one call, if this is that of so many."""
        return Timing(self.median / calls, self.fastest / calls, self.slowest / calls)


def time_side_by_side(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float, at_least: int = 3
) -> dict[str, Timing]:
    """Time several ways of doing one thing in turn, so that a noisy machine disturbs all alike.

    Each is called at least `at_least` times and for about `seconds` in all, after one call that is not counted.
    """
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    repetitions = 0
    while repetitions < at_least or time.perf_counter() - began < seconds * len(calls):
        repetitions += 1
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
    """Measure the bytes that one call allocates at its peak, above what was allocated before it."""
    if device.type == "cuda":
        gc.collect()
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


@dataclass(frozen=True)
class Runner:
    """Calls a function with one set of inputs after the other, so that none waits for it in a cache."""

    run: Callable[[], object]
    calls: int
    """calls of the function in one run"""
    launched: str
    """"CUDA graph", "Python" or "CPU": what makes the calls"""

    @classmethod
    def of(cls, call: Callable, sets: list[tuple[Tensor, ...]], device: torch.device) -> "Runner":
        """Make a runner: on a GPU a captured graph of one call a set: what the kernels take, without the launches from
        Python, which take longer than a small kernel. What cannot be captured is launched from Python."""
        if device.type != "cuda":
            return cls(_rotating(sets, call), 1, "CPU")
        try:
            return cls(_captured(sets, call), len(sets), "CUDA graph")
        except RuntimeError:  # of torch or of CUDA: the call synchronises, or allocates outside torch
            torch.cuda.synchronize(device)
            return cls(lambda: [call(*inputs) for inputs in sets], len(sets), "Python")


def capture(
    call: Callable[[], Results], warm_up: Callable[[], object] | None = None
) -> tuple[Callable[[], None], Results]:
    """Capture a graph of the call; → what replays it, and the results that a replay writes to. warm_up, or the call
    itself, goes before: first calls compile, tune and allocate workspaces, which a capture must not.

    Raises RuntimeError for what no graph can hold.
    """
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        (warm_up or call)()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(here), torch.cuda.graph(graph):  # a capture that fails leaves its stream current
        results = call()
    return graph.replay, results


def _captured(sets: list[tuple[Tensor, ...]], call: Callable) -> Callable[[], object]:
    def call_all() -> list:  # all results are kept, or they would go to one place, which stays in the cache
        return [call(*inputs) for inputs in sets]

    replay, _ = capture(call_all, warm_up=lambda: [call(*inputs) for inputs in sets[:2]])
    return replay


def _rotating(sets: list[tuple[Tensor, ...]], call: Callable) -> Callable[[], object]:
    turn = 0

    def next_call() -> object:
        nonlocal turn
        turn += 1
        return call(*sets[turn % len(sets)])

    return next_call
