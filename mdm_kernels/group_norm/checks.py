"""What group_norm_silu asks of its arguments; every error names the argument, what it is and what it must be."""

import torch
from torch import Tensor

from .. import arguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_options(num_groups, eps, activation) -> None:
    """Raise ValueError or TypeError unless num_groups ≥ 1, eps ≥ 0 and activation is "silu" or None."""
    arguments.check_ints(num_groups=num_groups)
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}; it must be at least 1")
    arguments.check_numbers(eps=eps)
    if not eps >= 0:  # false for NaN
        raise ValueError(f"eps is {eps}; it must be at least 0")
    if activation is not None:
        arguments.check_choice("activation", activation, ("silu",))


def check_arguments(x, skip, num_groups, weight, bias, eps, scale, shift, activation) -> None:
    """Raise ValueError or TypeError unless these are what `group_norm_silu` takes: x (N, C, *spatial), skip (N, C',
    *spatial), weight and bias (C + C',), scale and shift (N / T, C + C')."""
    check_options(num_groups, eps, activation)
    _check_dtype("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, C, *spatial)")
    rows, channels = x.shape[:2]
    if skip is not None:
        _check_skip(skip, x)
        channels += skip.shape[1]
    if channels % num_groups:
        normalised = f"x {tuple(x.shape)}" + ("" if skip is None else f" and skip {tuple(skip.shape)}")
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels of {normalised}")
    for name, tensor in {"weight": weight, "bias": bias, "scale": scale, "shift": shift}.items():
        if tensor is None:
            continue
        _check_dtype(name, tensor)
        _check_device(name, tensor, x)
        if name in ("weight", "bias") and tensor.shape != (channels,):
            owner = "x" if skip is None else "x and skip"
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}; it must be ({channels},), the channels of {owner}")
        if name in ("scale", "shift"):
            if tensor.dim() != 2 or tensor.shape[1] != channels:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (N / T, {channels})")
            if rows != 0 and (tensor.shape[0] == 0 or rows % tensor.shape[0]):
                raise ValueError(f"{name} has {tensor.shape[0]} rows; they must divide the {rows} rows of x")
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} must have one shape")


def check_channels(x, skip, num_channels: int) -> None:
    """Raise ValueError unless x and the skip have the channels of a module; what else they must be, `check_arguments`
    says."""
    tensors = [tensor for tensor in (x, skip) if isinstance(tensor, Tensor) and tensor.dim() >= 2]
    channels = sum(tensor.shape[1] for tensor in tensors)
    if tensors and channels != num_channels:
        shapes = " and skip ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"x {shapes} has {channels} channels; this norm was made for num_channels = {num_channels}")


def _check_skip(skip, x: Tensor) -> None:
    _check_dtype("skip", skip)
    if skip.dtype != x.dtype:
        raise TypeError(f"skip is {skip.dtype} and x {x.dtype}; they must have one dtype: convert one of them")
    _check_device("skip", skip, x)
    rows, _, *spatial = x.shape
    if skip.dim() != x.dim() or skip.shape[0] != rows or skip.shape[2:] != x.shape[2:] or skip.shape[1] == 0:
        expected = ", ".join(map(str, (rows, "channels", *spatial)))
        raise ValueError(f"skip has shape {tuple(skip.shape)}; beside x {tuple(x.shape)} it must be ({expected})")


def _check_dtype(name: str, tensor) -> None:
    arguments.check_tensors(**{name: tensor})
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, float16, bfloat16 or float64")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; they must be on one device")
