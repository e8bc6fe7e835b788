"""Everybody who computes a case: ours, plain PyTorch as it is, compiled and on each attention backend, libraries."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Case

OURS = "ours"
PYTORCH = "PyTorch"
COMPILED = "torch.compile"
SDPA = "SDPA "

SDPA_BACKENDS = {
    SDPA + "flash": SDPBackend.FLASH_ATTENTION,
    SDPA + "efficient": SDPBackend.EFFICIENT_ATTENTION,
    SDPA + "cudnn": SDPBackend.CUDNN_ATTENTION,
    SDPA + "math": SDPBackend.MATH,
}


def contenders(case: Case, with_compile: bool) -> dict[str, Callable]:
    """List functions of the case's inputs, by name. One that cannot do it, or lacks its library, raises when called."""
    found = {OURS: case.ours} if case.ours else {}
    found[PYTORCH] = case.plain
    if with_compile:
        found[COMPILED] = compiled(case.plain)
    if case.uses_sdpa:
        found |= {name: on_backend(case.plain, backend) for name, backend in SDPA_BACKENDS.items()}
    return found | case.libraries


def compiled(call: Callable) -> Callable:
    """Compile `call` for one shape, forgetting what was compiled before: a function that dynamo has seen at too many
    shapes would run uncompiled."""
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=False)


def on_backend(call: Callable, backend: SDPBackend) -> Callable:
    """Restrict what `call` computes by scaled_dot_product_attention to one of its backends."""

    def restricted(*inputs):
        with sdpa_kernel(backend):
            return call(*inputs)

    return restricted
