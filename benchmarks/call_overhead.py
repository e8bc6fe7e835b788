"""What a call of an op costs before its kernels run, without a GPU: python -m benchmarks.call_overhead

Checks, autocast, dispatch, autograd, allocation, the choice of launch options and Triton's own dispatch, in µs: all but
the call of the GPU's driver, which is left out. Beside it PyTorch's own eager ops on tiny tensors, whose time is nearly
all such cost. Where kernels are shorter than this (small batches, eager mode), this is what a layer costs; a CUDA graph
or torch.compile removes it. The fastest of many runs is given: what else a machine does can only add to it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mdm_kernels as mk
from benchmarks.timing import time_side_by_side
from mdm_kernels import backend
from mdm_kernels.aot.compiler import CompilingDriver

CALLS = 50  # timed as one


class LaunchingNowhere(CompilingDriver):
    """A driver for which Triton compiles and loads kernels, and whose launches do nothing."""

    @property
    def utils(self) -> "LaunchingNowhere":
        return self

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple:
        """Give what a loaded kernel is to Triton: module, function, registers, spills, and the most threads of a
        program."""
        return object(), 0, 0, 0, 1024

    def unload_module(self, module) -> None:
        pass

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 2**31}

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: None


class Case(NamedTuple):
    """One public function and what it is called with, beside plain PyTorch that does the same on smaller inputs."""

    ours: Callable[..., Tensor | list[Tensor]]
    inputs: tuple[Tensor, ...]  # what is differentiated
    plain: Callable[..., Tensor] | None = None
    plain_inputs: tuple[Tensor, ...] = ()


def cases() -> dict[str, Case]:
    """Make a case of each public function, on small float32 CPU tensors that require a gradient."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    images, alpha_bars = torch.randn(2, 3, 8, 8), torch.rand(2, 2)
    preds = leaf(2, 3, 8, 8), leaf(2, 3, 2, 2)
    rotary = torch.rand(4, 8)
    norm = leaf(1, 32, 1, 1), leaf(32), leaf(32)
    attention = leaf(1, 1, 1, 16), leaf(1, 1, 1, 16), leaf(1, 1, 1, 16)

    def two_attentions(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v)

    return {
        "group_norm_silu": Case(
            lambda x, weight, bias: mk.group_norm_silu(x, 8, weight, bias),
            (leaf(2, 32, 4, 4), leaf(32), leaf(32)),
            lambda x, weight, bias: F.silu(F.group_norm(x, 8, weight, bias)),
            norm,
        ),
        "group_norm_silu + FiLM": Case(
            lambda x, weight, bias, scale, shift: mk.group_norm_silu(x, 8, weight, bias, scale=scale, shift=shift),
            (leaf(2, 32, 4, 4), leaf(32), leaf(32), leaf(2, 32), leaf(2, 32)),
            lambda x, weight, bias, scale, shift: F.silu(F.group_norm(x, 8, weight, bias) * (1 + scale) + shift),
            (*norm, leaf(1, 32, 1, 1), leaf(1, 32, 1, 1)),
        ),
        "flash_attention": Case(
            lambda q, k, v: mk.flash_attention(q, k, v),
            (leaf(2, 2, 8, 16), leaf(2, 2, 8, 16), leaf(2, 2, 8, 16)),
            F.scaled_dot_product_attention,
            attention,
        ),
        "self_cross_attention": Case(
            lambda qkv, context: mk.self_cross_attention(qkv, context, num_heads=2),
            (leaf(2, 8, 96), leaf(2, 4, 64)),
            two_attentions,
            attention,
        ),
        "temporal_attention": Case(lambda qkv: mk.temporal_attention(qkv, num_heads=2, frames=4), (leaf(4, 8, 96),)),
        "temporal_attention, rotary": Case(
            lambda qkv: mk.temporal_attention(qkv, num_heads=2, frames=4, rotary=rotary), (leaf(4, 8, 96),)
        ),
        "multires_noise, 2 levels": Case(lambda: mk.multires_noise(images, alpha_bars, [1, 4], seed=1), ()),
        "multires_loss, 2 levels": Case(
            lambda *preds: mk.multires_loss(preds, images, alpha_bars, [1, 4], seed=1), preds
        ),
    }


def repeated(function: Callable, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], None]:
    """Make a function that calls `function` CALLS times, with its backward pass or else without gradients."""

    def call() -> None:
        for _ in range(CALLS):
            result = function(*inputs)
            if backward:
                torch.autograd.grad(result, inputs, result)

    def inference() -> None:
        with torch.no_grad():
            call()

    return call if backward else inference


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Measure the microseconds a call, by what is called."""
    calls = {"forward": repeated(case.ours, case.inputs, backward=False)}
    if case.inputs:
        calls["forward + backward"] = repeated(case.ours, case.inputs, backward=True)
    if case.plain:
        calls["plain forward"] = repeated(case.plain, case.plain_inputs, backward=False)
        calls["plain forward + backward"] = repeated(case.plain, case.plain_inputs, backward=True)
    with backend.use_backend("triton"), backend.launching_on_cpu():
        timings = time_side_by_side(calls, torch.device("cpu"), seconds=seconds)
    return {name: timing.fastest / CALLS * 1e6 for name, timing in timings.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each op and way (default: %(default)s)")
    seconds = parser.parse_args(arguments).seconds
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels are not launched; unset it", file=sys.stderr)
        return 2
    from triton.runtime import driver

    driver.set_active(LaunchingNowhere("sm_90"))  # pyright: ignore[reportArgumentType]: it launches nothing
    torch.set_num_threads(1)
    columns = ("forward", "plain forward", "forward + backward", "plain forward + backward")
    print(f"{'µs a call without its kernels':30}" + "".join(f"{column:>26}" for column in columns))
    for name, case in cases().items():
        found = measure(case, seconds)
        print(f"{name:30}" + "".join(f"{found[c]:26.1f}" if c in found else f"{'':26}" for c in columns), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
