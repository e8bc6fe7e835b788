"""What an op would launch, learnt from meta tensors, and compiled by Triton's own JIT for any target without a GPU."""

import collections
import concurrent.futures
import inspect
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .. import backend
from . import machine_code
from .machine_code import TARGETS
from .report import Result


class Launch(NamedTuple):
    """One recorded launch: enough to compile its kernel."""

    shape_class: str
    kernel: Any
    """a @triton.jit function, whose type is another one under the interpreter"""
    arguments: dict
    """the kernel's, and Triton's options, by name"""
    variant: int = 1
    """which of the kernel's specializations at this shape class, in the order of their launches"""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def by_tma(self) -> bool:
        """Whether it reads tiles by descriptors: a launch that only GPUs with TMA see."""
        return any(_is_descriptor(value) for value in self.arguments.values())

    @property
    def specialization(self) -> str:
        """What Triton compiles a kernel anew for: types, divisibility by 16, ones, absent arguments, constants."""
        parameters = inspect.signature(self.kernel.fn).parameters
        variables = {name for name, parameter in parameters.items() if "constexpr" not in str(parameter.annotation)}
        unspecialized = _unspecialized(self.kernel)

        def kind(name: str, value) -> str:
            if name not in variables:
                return repr(value)
            if isinstance(value, Tensor):
                return str(value.dtype)
            if _is_descriptor(value):
                return f"{value.base.dtype}{value.block_shape}"
            if isinstance(value, int) and not isinstance(value, bool):
                width = "i64" if abs(value) >= 2**31 else "i32"
                if name in unspecialized:
                    return width
                return "1" if value == 1 else f"{width}{'/16' * (value % 16 == 0)}"
            return type(value).__name__

        kinds = (f"{name}: {kind(name, value)}" for name, value in sorted(self.arguments.items()))
        return f"{self.name}({', '.join(kinds)})"


def _is_descriptor(value) -> bool:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return isinstance(value, TensorDescriptor)


def _unspecialized(kernel) -> list[str]:
    """The parameters whose values never have a kernel compiled anew; the interpreter's kernels know them elsewhere."""
    interpreted = getattr(kernel, "kwargs", {}).get("do_not_specialize")
    return getattr(kernel, "do_not_specialize", interpreted) or []


def record(classes: dict[str, Callable[[], None]]) -> list[Launch]:
    """Give the launches of these shape classes, each specialization once."""
    launches: dict[str, Launch] = {}
    seen = collections.Counter()
    for shape_class, call in classes.items():

        def add(kernel, arguments, shape_class=shape_class):
            launch = Launch(shape_class, kernel, arguments)
            if launch.specialization not in launches:
                seen[shape_class, launch.name] += 1
                launches[launch.specialization] = launch._replace(variant=seen[shape_class, launch.name])

        with backend.recording(add):
            call()
    return list(launches.values())


def jobs(launches: list[Launch], targets: Iterable[str]) -> list[tuple[Launch, str]]:
    """List each launch with every target that would see it."""
    return [
        (launch, target) for launch in launches for target in targets if TARGETS[target].has_tma or not launch.by_tma
    ]


class CompilingDriver:
    """Answers what Triton's JIT asks of a GPU driver when it compiles and does not launch. The target's name serves as
    the device, so that the JIT keeps one cache for each target."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target][:3])

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device) -> None:
        return None


def warm_up(launch: Launch, target: str):
    """Have Triton's JIT compile a launch's kernel for a target, and give what it made."""
    from triton.runtime import driver

    driver.set_active(CompilingDriver(target))  # pyright: ignore[reportArgumentType]: it launches nothing
    on_amd = TARGETS[target].backend == "hip"
    arguments = backend.wavefront_options(launch.arguments) if on_amd else launch.arguments
    return launch.kernel.warmup(grid=(1,), **arguments)


def compile_launch(launch: Launch, target: str, instructions: bool = True) -> dict[str, int]:
    """Compile a launch's kernel for a target, and give what `machine_code.measure` finds in it, with its instructions
    counted or not."""
    return machine_code.measure(warm_up(launch, target), instructions)


_jobs: list[tuple[Launch, str, bool]] = []
"""What `compile_launch` is given; the processes of the pool inherit it, since a kernel cannot be pickled"""


def _compile_job(index: int) -> dict[str, Any]:
    try:
        return compile_launch(*_jobs[index])
    except Exception as error:  # whatever the compiler throws is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"}


def compile_all(
    jobs: list[tuple[Launch, str]], instructions: bool = True, processes: int = 2
) -> Iterator[tuple[int, Result]]:
    """Compile jobs, each a launch and a target, and yield (number of the job, its result) in the order in which they
    are ready.

    instructions: count those of each kernel.
    """
    _jobs[:] = [(*job, instructions) for job in jobs]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        numbers = {pool.submit(_compile_job, number): number for number in range(len(jobs))}
        for future in concurrent.futures.as_completed(numbers):
            launch, target = jobs[numbers[future]]
            outcome: dict[str, Any]
            try:
                outcome = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                outcome = {"error": "the compiler crashed, on this kernel or on one before it"}
            yield numbers[future], Result(launch.shape_class, launch.name, target, launch.variant, **outcome)
