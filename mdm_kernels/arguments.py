"""The types of arguments, which all ops check alike; what their values must be, each op checks itself.

Every error is one line that names the argument, what it is and what it must be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(**arguments: Tensor) -> None:
    """Raise TypeError unless every argument is a dense tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a tensor")
        if value.layout != torch.strided:
            raise TypeError(f"{name} has layout {value.layout}; it must be a dense tensor, of layout torch.strided")


def check_optional_tensors(**arguments: Tensor | None) -> None:
    """Raise TypeError unless every argument is None or a dense tensor."""
    check_tensors(**{name: value for name, value in arguments.items() if value is not None})


def check_tensor_lists(**arguments: Sequence[Tensor]) -> None:
    """Raise TypeError unless every argument is a list or tuple of dense tensors."""
    for name, values in arguments.items():
        if not isinstance(values, list | tuple):
            raise TypeError(f"{name} is {type(values).__name__}; it must be a list of tensors")
        check_tensors(**{f"{name}[{i}]": value for i, value in enumerate(values)})


def check_ints(**arguments: int) -> None:
    """Raise TypeError unless every argument is an integer and no bool, ValueError for one that does not fit into 64
    bits."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name} is {type(value).__name__}; it must be an int")
        if not -(2**63) <= value < 2**63:  # value.bit_length() would make a dynamic size of torch.compile a constant
            raise ValueError(f"{name} is {value}; it must fit into 64 bits")


def check_bools(**arguments: bool) -> None:
    """Raise TypeError unless every argument is True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a bool")


def check_numbers(**arguments: float) -> None:
    """Raise TypeError unless every argument is an integer or a real number, and no bool."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            raise TypeError(f"{name} is {type(value).__name__}; it must be a number")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise TypeError unless `value` is a string, ValueError unless it is one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}; it must be one of the strings {', '.join(choices)}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
