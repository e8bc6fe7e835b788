"""Measures a case: every contender's time, peak memory and error; of one that fails, the reason."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mdm_kernels as mk
from benchmarks.case import Case
from benchmarks.contenders import COMPILED, OURS, contenders
from benchmarks.machine import Rates
from benchmarks.timing import Runner, Timing, peak_memory, time_side_by_side
from mdm_kernels.layouts import is_channels_last

CACHE_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}  # inputs in rotation take at least this much together
MOST_SETS = {"cuda": 128, "cpu": 16}
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Outcome:
    """What one contender did, or why it failed."""

    timing: Timing | None = None
    peak: int | None = None
    """bytes at the peak of one call, above its inputs"""
    error: float | None = None
    """‖result − exact‖ / ‖exact‖ in float64, the largest of its results; None where nothing exact is known"""
    launched: str = ""
    """"CUDA graph", "Python" or "CPU": what was timed; a graph has no launch overhead"""
    failure: str = ""


@dataclass(frozen=True)
class KernelRow:
    """One case in one step: forward, or forward and backward."""

    op: str
    shape: str
    step: str
    largest_tensor: int
    """bytes of the largest input"""
    least_bytes: int
    operations: int
    floor: float
    """seconds: the bytes at the copy rate or the operations at the matrix rate, whichever takes longer"""
    waits_for_memory: bool
    """whether it is the bytes"""
    outcomes: dict[str, Outcome]

    def seconds(self, contender: str) -> float | None:
        """The median time of a contender; None if it did not run."""
        outcome = self.outcomes.get(contender)
        return outcome.timing.median if outcome and outcome.timing else None

    def rivals(self) -> dict[str, float]:
        """The median times of all that ran but ours."""
        return {name: o.timing.median for name, o in self.outcomes.items() if name != OURS and o.timing}


def steps(case: Case) -> list[str]:
    """List the steps that a case is measured in: forward, and with its backward pass if it has one."""
    return [FORWARD, BOTH] if case.backward_bytes else [FORWARD]


def measure(
    case: Case, step: str, rates: Rates, device: torch.device, *, seconds: float, with_compile: bool
) -> KernelRow:
    """Measure every contender in one step of a case. Whatever one raises is its outcome, and the others go on; they are
    timed in turn, for about `seconds` each."""
    backward = step == BOTH
    sets = _input_sets(case, backward, device)
    exact = _exact(case, sets[0], backward)
    outcomes: dict[str, Outcome] = {}
    runners: dict[str, Runner] = {}
    calls = {name: _step(case, function, backward) for name, function in contenders(case, with_compile).items()}
    calls |= {name: _inside(context, calls[OURS]) for name, context in case.experiments.items()}
    for name, call in calls.items():
        try:
            results = call(*sets[0])  # compiles what there is to compile
            error = None
            if exact is not None and not (case.plain_is_random and name != OURS):
                error = _error(case, results, exact, backward)
            del results
            unseen = name == COMPILED and device.type == "cpu"  # where peak_memory counts op by op
            peak = None if unseen else peak_memory(lambda call=call: call(*sets[0]), device)
            runners[name] = Runner.of(call, sets, device)
            outcomes[name] = Outcome(peak=peak, error=error, launched=runners[name].launched)
        except Exception as failure:  # a rival may raise anything
            outcomes[name] = failed(failure)
    timings = time_side_by_side({name: runner.run for name, runner in runners.items()}, device, seconds=seconds)
    for name, timing in timings.items():
        outcomes[name] = dataclasses.replace(outcomes[name], timing=timing.of_one_among(runners[name].calls))
    largest = max(tensor.numel() * tensor.element_size() for tensor in sets[0])
    return row(case, step, rates, outcomes, largest)


def row(case: Case, step: str, rates: Rates, outcomes: dict[str, Outcome], largest_tensor: int = 0) -> KernelRow:
    """Make a row of these outcomes, with the floor that the machine's rates set."""
    least_bytes, operations = case.least_bytes(step == BOTH), case.operations(step == BOTH)
    memory, matrix = least_bytes / rates.copy, operations / rates.matrix
    bound = (max(memory, matrix), memory >= matrix)
    return KernelRow(case.op, case.shape, step, largest_tensor, least_bytes, operations, *bound, outcomes)


def failed(failure: Exception) -> Outcome:
    """Make the outcome of a contender that raised: the error's type and its first line."""
    lines = str(failure).strip().splitlines() or [""]
    return Outcome(failure=f"{type(failure).__name__}: {lines[0]}")


def _input_sets(case: Case, backward: bool, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Sets of inputs that no cache holds together, each followed by the gradients of the results if `backward`: where
    images come in channels_last, so do they, as a convolution hands them back. CUDA's group norm answers contiguous
    all the same, and a gradient like its answer would be copied within our time."""

    def draw() -> tuple[Tensor, ...]:
        inputs = case.inputs()
        if not backward:
            return inputs
        with torch.no_grad():
            results = _as_list(case.plain(*inputs))
        return *inputs, *(_gradient(result, inputs[0]) for result in results)

    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    first = draw()
    one_set = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies = min(max(CACHE_BYTES[device.type] // one_set, 1), MOST_SETS[device.type])
    return [first, *(draw() for _ in range(copies - 1))]


def _gradient(result: Tensor, x: Tensor) -> Tensor:
    images = result.dim() == 4 and is_channels_last(x)
    return torch.randn_like(result, memory_format=torch.channels_last if images else torch.preserve_format)


def _as_list(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _step(case: Case, function: Callable, backward: bool) -> Callable[..., list[Tensor]]:
    """A call of a set of inputs → the results, and after them the gradients of the differentiated inputs."""
    count = len(case.sample_dims)
    differentiated = count if case.differentiated is None else case.differentiated

    def forward(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _as_list(function(*inputs))

    def forward_and_backward(*tensors: Tensor) -> list[Tensor]:
        inputs, upstream = tensors[:count], tensors[count:]
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:differentiated]]
        results = _as_list(function(*leaves, *inputs[differentiated:]))
        return [*results, *torch.autograd.grad(results, leaves, upstream)]

    return forward_and_backward if backward else forward


def _inside(context: Callable, call: Callable) -> Callable:
    def call_inside(*inputs):
        with context():
            return call(*inputs)

    return call_inside


def _exact(case: Case, tensors: tuple[Tensor, ...], backward: bool) -> list[Tensor] | None:
    """The results for the first sample alone, in float64."""
    if case.oracle is None:
        return None
    dims = [*case.sample_dims, *[0] * (len(tensors) - len(case.sample_dims))]
    sample = [_first_sample(case, x, dim).double() for x, dim in zip(tensors, dims, strict=True)]
    with mk.use_backend("torch"):
        return _step(case, case.oracle, backward)(*sample)


def _first_sample(case: Case, x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.narrow(dim, 0, case.sample_rows)


def _error(case: Case, results: list[Tensor], exact: list[Tensor], backward: bool) -> float:
    """The largest relative error of the first sample; a gradient that all samples share is left out."""
    gradients = case.sample_dims[: case.differentiated] if backward else ()
    dims = [*[0] * (len(results) - len(gradients)), *gradients]
    errors = [
        (_first_sample(case, result, dim).double() - wanted).norm() / wanted.norm()
        for result, wanted, dim in zip(results, exact, dims, strict=True)
        if dim is not None
    ]
    return torch.stack(errors).max().item()  # NaN if one is
