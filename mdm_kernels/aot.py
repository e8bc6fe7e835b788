"""Compile every kernel ahead of time, without a GPU, and report what it costs: python -m mdm_kernels.aot

A shape class calls an op's launching function on meta tensors; `backend.recording` hands over what it would launch;
Triton's own JIT specialises and compiles each launch for every target. Exit status: 0 if all is well, 1 if a kernel
fails to compile or spills registers, 2 if kernels cannot be compiled here at all.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import backend

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
ops = torch.ops.mdm_kernels


# Shape classes: name → a call on meta tensors that reaches every launch of an op. Shapes are those of the models, one
# for each set of kernel constants; batch sizes are small, because no kernel depends on them.


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def group_norm_class(*shape: int, dtype=torch.bfloat16, channels_last=True, film=False, frames=1, silu=True) -> None:
    """Forward and backward of group_norm_silu in 32 groups, with float32 weights."""
    from . import group_norm  # noqa: F401

    x = meta(*shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = meta(shape[1], dtype=torch.float32), meta(shape[1], dtype=torch.float32)
    scale, shift = meta(shape[0] // frames, 2 * shape[1], dtype=dtype).chunk(2, 1) if film else (None, None)
    _, mean, rstd = ops.group_norm_silu_forward(x, 32, weight, bias, scale, shift, 1e-5, silu)
    ops.group_norm_silu_backward(x, x, mean, rstd, 32, weight, bias, scale, shift, silu)


def multires_class(
    *shape: int,
    strides: list[tuple[int, int]],
    seed: int | None = 1,
    dtype=torch.float32,
    pred_dtype=torch.bfloat16,
    channels_last=True,
) -> None:
    """multires_noise and multires_loss, forward and backward; with no seed, the noise is given."""
    from . import multires

    images = meta(*shape, dtype=dtype)
    times, spaces = (list(part) for part in zip(*strides, strict=True))
    alpha_bars = meta(len(strides), shape[0], dtype=torch.float32)
    noise = [multires.reference.level_image(images, stride).to(dtype) for stride in strides]
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    preds = [eps.to(pred_dtype, memory_format=last if channels_last else torch.contiguous_format) for eps in noise]
    source = ([], seed) if seed is not None else (noise, None)
    spaces_and_weights = ("v", "eps", [1.0] * len(strides))
    ops.multires_noise(images, alpha_bars, times, spaces, *source)
    loss, residuals = ops.multires_loss_forward(
        preds, images, alpha_bars, times, spaces, *source, *spaces_and_weights, True
    )
    ops.multires_loss_backward(residuals, loss, alpha_bars, *spaces_and_weights)


SHAPE_CLASSES: dict[str, Callable[[], None]] = {
    "group_norm 256×64² FiLM": functools.partial(group_norm_class, 2, 256, 64, 64, film=True),
    "group_norm 512×32² FiLM": functools.partial(group_norm_class, 2, 512, 32, 32, film=True),
    "group_norm 768×16²": functools.partial(group_norm_class, 2, 768, 16, 16, silu=False),
    "group_norm 64×256² FiLM": functools.partial(group_norm_class, 2, 64, 256, 256, film=True),
    "group_norm 32×1024²": functools.partial(group_norm_class, 2, 32, 1024, 1024),
    "group_norm 512×32² fp32 NCHW": functools.partial(
        group_norm_class, 2, 512, 32, 32, dtype=torch.float32, channels_last=False
    ),
    "group_norm 128×128² fp16, 16 frames": functools.partial(
        group_norm_class, 16, 128, 128, 128, dtype=torch.float16, film=True, frames=16
    ),
    "multires 256² + 64²": functools.partial(multires_class, 2, 3, 256, 256, strides=[(1, 1), (1, 4)]),
    "multires 1024² + 256² + 64²": functools.partial(
        multires_class, 2, 3, 1024, 1024, strides=[(1, 1), (1, 4), (1, 16)], dtype=torch.bfloat16
    ),
    "multires 16×256² + 16×64² + 1×64²": functools.partial(
        multires_class, 2, 3, 16, 256, 256, strides=[(1, 1), (1, 4), (16, 4)], channels_last=False
    ),
    "multires 256² + 64² fp32, noise given": functools.partial(
        multires_class,
        *(2, 3, 256, 256),
        strides=[(1, 1), (1, 4)],
        seed=None,
        pred_dtype=torch.float32,
        channels_last=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: enough to compile its kernel."""

    kernel: object
    args: tuple
    options: dict

    @functools.cached_property
    def specialization(self) -> str:
        """What Triton compiles a kernel anew for: types, divisibility by 16, ones, absent arguments, constants."""

        def kind(value) -> str:
            if isinstance(value, Tensor):
                return str(value.dtype)
            if isinstance(value, int) and not isinstance(value, bool):
                return "1" if value == 1 else f"{'i64' if abs(value) >= 2**31 else 'i32'}{'/16' * (value % 16 == 0)}"
            return type(value).__name__

        return f"{self.name}({', '.join(map(kind, self.args))}) {self.options}"

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def record(classes: dict[str, Callable[[], None]]) -> dict[str, tuple[str, Launch]]:
    """Specialization → (shape class that launches it first, launch), for all launches of these shape classes."""
    launches: dict[str, tuple[str, Launch]] = {}
    for name, call in classes.items():

        def add(kernel, args, options, name=name):
            launch = Launch(kernel, args, options)
            launches.setdefault(launch.specialization, (name, launch))

        with backend.recording(add):
            call()
    return launches


class TargetDriver:
    """What Triton's JIT asks of a GPU driver when it compiles and does not launch; the target serves as the device,
    so that the JIT keeps one cache for each."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        self.name, self.target = name, GPUTarget(*TARGETS[name])

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device) -> None:
        return None


def compile_launch(launch: Launch, target: str) -> dict[str, int]:
    """Registers, stack bytes, shared memory bytes and spilled registers of a launch's kernel on a target."""
    from triton.runtime import driver

    driver.set_active(TargetDriver(target))
    compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    usage = nvidia_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd_usage(compiled.asm["amdgcn"])
    return usage | {"shared": compiled.metadata.shared}


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "spills": stack // 4}


def amd_usage(assembly: str) -> dict[str, int]:
    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the table."""

    shape_class: str
    kernel: str
    target: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""

    @property
    def fault(self) -> str:
        """Why this kernel must not ship, in one line; empty if it may."""
        if self.error:
            return self.error
        return f"spills: {self.spills} registers, {self.stack} bytes of stack" if self.spills or self.stack else ""


_jobs: list[tuple[str, Launch, str]] = []
"""(shape class, launch, target); the processes of the pool inherit it, since a kernel cannot be pickled"""


def _compile_job(index: int) -> Result:
    shape_class, launch, target = _jobs[index]
    try:
        return Result(shape_class, launch.name, target, **compile_launch(launch, target))
    except Exception as error:  # whatever the compiler throws is the finding
        text = next(iter(str(error).strip().splitlines()), "")
        return Result(shape_class, launch.name, target, error=f"{type(error).__name__}: {text}")


def compile_all(jobs: list[tuple[str, Launch, str]], processes: int = 2) -> Iterator[Result]:
    """Results in the order in which they are ready."""
    _jobs[:] = jobs
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_compile_job, index) for index in range(len(jobs))]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def table(results: list[Result]) -> str:
    header = ("shape class", "kernel", "target", "registers", "stack", "shared", "spills")
    rows = [header, *((r.shape_class, r.kernel, r.target, r.registers, r.stack, r.shared, r.spills) for r in results)]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(header))]
    line = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(line.format(*row) for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mdm_kernels.aot", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as JSON, too")
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only shape classes whose name contains TEXT")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    classes = {name: call for name, call in SHAPE_CLASSES.items() if options.filter in name}
    if not classes:
        parser.error(f"no shape class contains {options.filter!r}")
    launches = record(classes)
    jobs = [(name, launch, target) for name, launch in launches.values() for target in targets]
    results = []
    for result in compile_all(jobs):
        results.append(result)
        print(f"\r{len(results)}/{len(jobs)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    order = {(name, launch.name, target): i for i, (name, launch, target) in enumerate(jobs)}
    results.sort(key=lambda r: order[r.shape_class, r.kernel, r.target])
    print(table([r for r in results if not r.error]))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    faults = [r for r in results if r.fault]
    for r in faults:
        print(f"{r.kernel} ({r.shape_class}) on {r.target}: {r.fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
