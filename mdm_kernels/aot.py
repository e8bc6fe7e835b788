"""Compile every kernel ahead of time, without a GPU, and report what it costs: python -m mdm_kernels.aot

A shape class (shape_classes.py) calls an op's launching functions on meta tensors; `backend.recording` hands over what
these would launch; Triton's own JIT specialises and compiles each launch for every target. Exit status: 0 if all is
well; 1 if a kernel fails to compile, spills registers or needs more shared memory than there is; 2 if nothing can be
compiled here at all.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from . import backend, machine_code
from .aot_report import Result, markdown, table, write_json
from .machine_code import TARGETS
from .shape_classes import SHAPE_CLASSES


class Launch(NamedTuple):
    """One recorded launch: enough to compile its kernel."""

    shape_class: str
    kernel: object
    args: tuple
    options: dict
    variant: int = 1
    """which of the kernel's specializations at this shape class, in the order of their launches"""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def specialization(self) -> str:
        """What Triton compiles a kernel anew for: types, divisibility by 16, ones, absent arguments, constants."""

        def kind(value) -> str:
            if isinstance(value, Tensor):
                return str(value.dtype)
            if isinstance(value, int) and not isinstance(value, bool):
                return "1" if value == 1 else f"{'i64' if abs(value) >= 2**31 else 'i32'}{'/16' * (value % 16 == 0)}"
            return type(value).__name__

        return f"{self.name}({', '.join(map(kind, self.args))}) {self.options}"


def record(classes: dict[str, Callable[[], None]]) -> list[Launch]:
    """The launches of these shape classes, each specialization once."""
    launches: dict[str, Launch] = {}
    seen = collections.Counter()
    for shape_class, call in classes.items():

        def add(kernel, args, options, shape_class=shape_class):
            launch = Launch(shape_class, kernel, args, options)
            if launch.specialization not in launches:
                seen[shape_class, launch.name] += 1
                launches[launch.specialization] = launch._replace(variant=seen[shape_class, launch.name])

        with backend.recording(add):
            call()
    return list(launches.values())


class CompilingDriver:
    """What Triton's JIT asks of a GPU driver when it compiles and does not launch. The target's name serves as the
    device, so that the JIT keeps one cache for each target."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target][:3])

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device) -> None:
        return None


def compile_launch(launch: Launch, target: str) -> dict[str, int]:
    """`machine_code.measure` of a launch's kernel on a target."""
    from triton.runtime import driver

    driver.set_active(CompilingDriver(target))
    options = backend.wavefront_options(launch.options) if TARGETS[target].backend == "hip" else launch.options
    compiled = launch.kernel.warmup(*launch.args, grid=(1,), **options)
    return machine_code.measure(compiled)


_jobs: list[tuple[Launch, str]] = []
"""(launch, target); the processes of the pool inherit it, since a kernel cannot be pickled"""


def _compile_job(index: int) -> dict:
    launch, target = _jobs[index]
    try:
        return compile_launch(launch, target)
    except Exception as error:  # whatever the compiler throws is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"}


def compile_all(jobs: list[tuple[Launch, str]], processes: int = 2) -> Iterator[tuple[int, Result]]:
    """(number of the job, its result), in the order in which they are ready."""
    _jobs[:] = jobs
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        numbers = {pool.submit(_compile_job, number): number for number in range(len(jobs))}
        for future in concurrent.futures.as_completed(numbers):
            launch, target = jobs[numbers[future]]
            try:
                outcome = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                outcome = {"error": "the compiler crashed, on this kernel or on one before it"}
            yield numbers[future], Result(launch.shape_class, launch.name, target, launch.variant, **outcome)


def show_progress(done: int, total: int) -> None:
    """One line on a terminal, ten in a log."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} compiled", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done * 10 // total > (done - 1) * 10 // total:
        print(f"{done}/{total} compiled", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mdm_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page for the documentation there")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="LIST", help="default: %(default)s")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only shape classes whose name contains TEXT")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    classes = {name: call for name, call in SHAPE_CLASSES.items() if options.filter in name}
    if not classes:
        parser.error(f"no shape class contains {options.filter!r}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    import triton

    jobs = [(launch, target) for launch in record(classes) for target in targets]
    by_job = {}
    for number, result in compile_all(jobs):
        by_job[number] = result
        show_progress(len(by_job), len(jobs))
    results = [by_job[number] for number in sorted(by_job)]
    print(table([result for result in results if not result.error]))
    if options.json:
        write_json(options.json, triton.__version__, results)
    if options.markdown:
        options.markdown.write_text(markdown(triton.__version__, results))
    faults = [result for result in results if result.fault]
    for result in faults:
        print(f"{result.label} ({result.shape_class}) on {result.target}: {result.fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
