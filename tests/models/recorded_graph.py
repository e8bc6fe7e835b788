"""A CUDA graph where there is no GPU: records the operations of a capture, and replays them on the same tensors.

Like a graph it keeps every address and every Python number of the capture, and refuses to look at a tensor's value.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdm_kernels.group_norm import reference

LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class RecordedGraph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`. replays: how often it was replayed."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in LOOKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    @torch.inference_mode()  # where tensors of either mode may be written to
    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, kept in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(kept), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # the same where it is a view
                    old.copy_(new)


class _Stream:
    def __init__(self, log: list[str]):
        self.log = log

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append("wait")


def install(monkeypatch) -> tuple[list[RecordedGraph], list[str]]:
    """Put recorded graphs in the place of CUDA's: the graphs captured, and a log of what was asked of streams."""
    graphs, log = [], []

    @contextlib.contextmanager
    def capture(graph: RecordedGraph, pool=None, capture_error_mode="global"):
        graphs.append(graph)
        log.append("capture" if capture_error_mode == "thread_local" else f"capture, {capture_error_mode}")
        with graph:
            yield

    @contextlib.contextmanager
    def on_stream(stream: _Stream):
        log.append("side")
        yield

    fakes = {
        "CUDAGraph": RecordedGraph,
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: _Stream(log),
        "current_stream": lambda: _Stream(log),
        "stream": on_stream,
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(reference, "_holds_cpu_data", lambda x: False)  # as on a GPU no choice may follow from values
    return graphs, log
