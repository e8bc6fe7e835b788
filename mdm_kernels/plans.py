"""Launches that are worked out once.

What an op launches follows from the shapes, strides, dtypes and alignment of its tensors, and from its options. The
first call with these notes its launches as Triton compiled them; each later one fills in its own tensors. So neither
the choice of tiles nor Triton's look at every argument, each of which takes longer than a small kernel, is gone through
again. What the multires ops launch depends on a seed too, and is not planned: a training step calls each once.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend

MOST = 1024  # plans of one launching function; the oldest goes when there are more

_plans: list[dict] = []
"""of each launching function: by what its launches follow from, a plan, or None where none can be made"""

_UNKNOWN: Any = object()

_noted = threading.local()
"""scratch, while a launching function is noted: of each tensor that it made, the tensor and what makes such a one"""


class Step(NamedTuple):
    """One launch."""

    kernel: Any
    launch: Callable
    """of the kernel's arguments, in their order"""
    arguments: list
    """with anything in the places of tensors"""
    tensors: list[tuple[int, int]]
    """the place of a tensor among the arguments, and its number among those of the plan"""
    descriptors: list[tuple[int, int]]
    """the place of a descriptor of a tensor among the arguments, which has it without the tensor, and the latter's
    number"""


class Plan(NamedTuple):
    """The launches of a call."""

    device: torch.device
    scratch: list[Callable[[], Tensor]]
    steps: list[Step]

    def run(self, tensors: list[Tensor]) -> None:
        """Launch every step with these tensors, those of a call in their order, and with scratch memory, which is added
        to the list."""
        tensors += [make() for make in self.scratch]
        with backend.on_device(self.device):
            for step in self.steps:
                arguments = step.arguments.copy()
                for place, number in step.tensors:
                    arguments[place] = tensors[number]
                for place, number in step.descriptors:
                    arguments[place] = _described(tensors[number], arguments[place])
                backend.count_launch(step.kernel, self.device)
                step.launch(*arguments)


def planned(launching: Callable) -> Callable:
    """Decorator of a function of tensors, the first of which says where it launches, and of options that can be hashed:
    it calls `backend.launch` with these tensors or its `scratch`, and does nothing else that matters. Where it launches
    others (a copy of what is not contiguous), it is called anew each time."""
    plans: dict[tuple, Plan | None] = {}
    _plans.append(plans)

    @functools.wraps(launching)
    def launch(*args) -> None:
        if not _can_be_planned():
            launching(*args)
            return
        # of a tensor all that launches may depend on; Triton compiles pointers that 16 divides apart from others
        key = args[0].device, *[
            (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16) if isinstance(arg, Tensor) else arg
            for arg in args
        ]
        plan = plans.get(key, _UNKNOWN)
        if plan is _UNKNOWN:
            plans[key] = _noting(launching, args)
            if len(plans) > MOST:
                plans.pop(next(iter(plans)), None)
        elif plan is None:
            launching(*args)
        else:
            plan.run([arg for arg in args if isinstance(arg, Tensor)])

    return launch


def scratch(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
    """Make memory that a planned function needs for itself, on like's device: anything is in it, or zeros."""
    allocate = torch.zeros if zero else torch.empty
    device = like.device
    tensor = allocate(shape, dtype=dtype, device=device)
    if (made := getattr(_noted, "scratch", None)) is not None:
        made.append((tensor, lambda: allocate(shape, dtype=dtype, device=device)))
    return tensor


def forget() -> None:
    """Drop all plans: for what changes, other than by arguments, which launches a call makes."""
    for plans in _plans:
        plans.clear()


def _can_be_planned() -> bool:
    """Triton for AMD looks at the size of a tensor's memory too; a recorder wants every launch."""
    return torch.version.hip is None and not backend.is_recording()


def _noting(launching: Callable, args: tuple) -> Plan | None:
    """Run it, and say how to do so again."""
    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)  # no tensor is given twice
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    launches, _noted.scratch = [], []
    try:
        with backend.noting(lambda *launch: launches.append(launch)):
            launching(*args)
        made = _noted.scratch
    finally:
        del _noted.scratch
    numbers = {id(tensor): number for number, tensor in enumerate([*tensors, *(tensor for tensor, _ in made)])}
    steps = [step for launch in launches if (step := _step(numbers, *launch))]
    complete = len(steps) == len(launches)
    return Plan(args[0].device, [make for _, make in made], steps) if complete else None


def _step(numbers: dict[int, int], kernel, grid: tuple[int, ...], arguments: dict, compiled) -> Step | None:
    """None if a tensor, or one that is described, is not among those numbered, or nothing was compiled."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # there where a kernel was launched

    values = [arguments[name] for name in inspect.signature(kernel.fn).parameters]
    tensors = [(place, id(value)) for place, value in enumerate(values) if isinstance(value, Tensor)]
    descriptors = [(place, id(value.base)) for place, value in enumerate(values) if isinstance(value, TensorDescriptor)]
    launch = compiled_launch(kernel, grid, arguments, compiled)
    if launch is None or any(tensor not in numbers for _, tensor in tensors + descriptors):
        return None
    for place, _ in tensors:
        values[place] = None
    for place, _ in descriptors:
        values[place] = _described(None, values[place])
    tensors, descriptors = ([(place, numbers[x]) for place, x in found] for found in (tensors, descriptors))
    return Step(kernel, launch, values, tensors, descriptors)


def _described(tensor: Tensor | None, descriptor):
    """The same descriptor, of another tensor in its shape, strides and alignment."""
    other = copy.copy(descriptor)
    other.base = tensor
    return other


def compiled_launch(kernel, grid: tuple[int, ...], arguments: dict, compiled) -> Callable | None:
    """Give what launches a kernel as compiled; None of an interpreted one, which never is."""
    return None if compiled is None else compiled[(*grid, 1, 1)[:3]]
