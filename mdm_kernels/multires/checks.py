"""What multires_noise and multires_loss accept: every rule about their arguments, and its message."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import arguments
from .reference import PREDICTIONS

Stride = int | tuple[int, int]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked_strides(images: Tensor, strides: Sequence[Stride]) -> list[tuple[int, int]]:
    """Give every level's stride as (time, space). Raises ValueError where the images do not divide by it, and
    ValueError or TypeError for what are no images or no strides."""
    arguments.check_tensors(images=images)
    if images.dim() not in (4, 5):
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be (B, C, H, W) or (B, C, T, H, W)")
    if images.dtype not in DTYPES:
        raise TypeError(f"images is {images.dtype}; it must be float32, float16, bfloat16 or float64")
    if not isinstance(strides, list | tuple):
        raise TypeError(f"strides is {type(strides).__name__}; it must be a list of one stride a level")
    if len(strides) == 0:
        raise ValueError("strides is empty; it must hold one stride a level")
    pairs = [tuple(stride if isinstance(stride, list | tuple) else (1, stride)) for stride in strides]
    frames = 1 if images.dim() == 4 else images.shape[2]
    for i, pair in enumerate(pairs):
        for part in pair:
            arguments.check_ints(**{f"strides[{i}]": part})
        if len(pair) != 2 or not all(0 < part < 65536 for part in pair):
            raise ValueError(f"strides has {pair}; a stride must be an int or (time, space), each in 1…65535")
        time, space = pair
        if images.dim() == 4 and time != 1:
            raise ValueError(f"strides has {pair} for images of shape {tuple(images.shape)}; without frames, time is 1")
        if frames % time or images.shape[-2] % space or images.shape[-1] % space:
            shape = tuple(images.shape)
            raise ValueError(f"images has shape {shape}; its T, H, W must divide by strides[{i}] = {pair}")
    return [(time, space) for time, space in pairs]


def level_shape(images: Tensor, stride: tuple[int, int]) -> tuple[int, ...]:
    """Give the shape of `images` at a level: (B, C, H/space, W/space) or (B, C, T/time, H/space, W/space)."""
    time, space = stride
    frames = () if images.dim() == 4 else (images.shape[2] // time,)
    return (*images.shape[:2], *frames, images.shape[-2] // space, images.shape[-1] // space)


def check_alpha_bars(images: Tensor, alpha_bars: Tensor, levels: int) -> None:
    """Raise ValueError unless alpha_bars is (levels, B) on the images' device, TypeError unless it is float32 or
    float64."""
    arguments.check_tensors(alpha_bars=alpha_bars)
    if tuple(alpha_bars.shape) != (levels, images.shape[0]):
        raise ValueError(
            f"alpha_bars has shape {tuple(alpha_bars.shape)}; with {levels} strides and {images.shape[0]} images "
            f"it must be ({levels}, {images.shape[0]})"
        )
    if alpha_bars.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"alpha_bars is {alpha_bars.dtype}; it must be float32 or float64")
    _check_device("alpha_bars", alpha_bars, images)


def check_noise(
    images: Tensor, strides: list[tuple[int, int]], noise: Sequence[Tensor] | None, seed: int | Tensor | None
) -> None:
    """Raise ValueError or TypeError unless there is exactly one of `noise` and `seed`: tensors of the levels' shapes,
    or an integer in 0…2⁶³−1 or a tensor of one int64."""
    if (noise is None) == (seed is None):
        raise ValueError("give either noise or seed, and not both")
    if seed is not None:
        _check_seed(seed, images)
    if noise is None:
        return
    arguments.check_tensor_lists(noise=noise)
    if len(noise) != len(strides):
        raise ValueError(f"noise has {len(noise)} tensors; it must hold one for each of the {len(strides)} strides")
    for i, (eps, stride) in enumerate(zip(noise, strides, strict=True)):
        _check_level(f"noise[{i}]", eps, level_shape(images, stride), images)


def _check_seed(seed: int | Tensor, images: Tensor) -> None:
    """An integer in 0…2⁶³−1, or a tensor of one, whose value is not looked at: that would stall a GPU."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed is a tensor of {seed.dtype}; it must be an int or a tensor of torch.int64")
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {tuple(seed.shape)}; it must hold one element")
        _check_device("seed", seed, images)
        return
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed is {type(seed).__name__}; it must be an int, or a tensor of one int64")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2⁶³")


def check_no_gradient(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Raise ValueError if one of these requires a gradient, which would silently be zero: only predictions are
    differentiated."""
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        for tensor in [value] if isinstance(value, Tensor) else value or []:
            if tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, which is not computed; pass {name}.detach()")


def checked_rows(
    images: Tensor, strides: list[tuple[int, int]], preds: Sequence[Tensor], rows: Sequence[int] | None
) -> list[int]:
    """Give how many leading samples each level has. Raises ValueError unless the predictions have just those, and
    ValueError or TypeError for other faults of `preds` or `rows`."""
    batch = images.shape[0]
    arguments.check_tensor_lists(preds=preds)
    if len(preds) != len(strides):
        raise ValueError(f"preds has {len(preds)} tensors; it must hold one for each of the {len(strides)} strides")
    rows = [batch] * len(strides) if rows is None else rows
    if not isinstance(rows, list | tuple):
        raise TypeError(f"rows is {type(rows).__name__}; it must be a list of one count a level")
    arguments.check_ints(**{f"rows[{i}]": count for i, count in enumerate(rows)})
    if len(rows) != len(strides) or not all(0 <= count <= batch for count in rows):
        raise ValueError(f"rows is {rows}; it must hold {len(strides)} counts, each in 0…{batch}")
    for i, (pred, stride, count) in enumerate(zip(preds, strides, rows, strict=True)):
        shape = (count, *level_shape(images, stride)[1:])
        if tuple(pred.shape) != shape:
            raise ValueError(
                f"preds[{i}] has shape {tuple(pred.shape)}; with images {tuple(images.shape)} and rows {rows} it must "
                f"be {shape}"
            )
        _check_level(f"preds[{i}]", pred, shape, images)
    return list(rows)


def check_loss_spaces(prediction: str, loss_target: str) -> None:
    """Raise ValueError or TypeError unless both are one of "v", "eps" and "x0"."""
    for name, value in (("prediction", prediction), ("loss_target", loss_target)):
        arguments.check_choice(name, value, PREDICTIONS)


def checked_weights(weights: Sequence[float] | None, levels: int) -> list[float]:
    """Give a weight for each level, 1 by default. Raises TypeError unless they are a list of numbers, ValueError unless
    there is one a level."""
    weights = [1.0] * levels if weights is None else weights
    if not isinstance(weights, list | tuple):
        raise TypeError(f"weights is {type(weights).__name__}; it must be a list of one number a level")
    arguments.check_numbers(**{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    if len(weights) != levels:
        raise ValueError(f"weights has {len(weights)} entries; it must hold one for each of the {levels} strides")
    return [float(weight) for weight in weights]


def _check_level(name: str, tensor: Tensor, shape: tuple[int, ...], images: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with images {tuple(images.shape)} this level's is {shape}"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, float16, bfloat16 or float64")
    _check_device(name, tensor, images)


def _check_device(name: str, tensor: Tensor, images: Tensor) -> None:
    if tensor.device != images.device:
        raise ValueError(f"{name} is on {tensor.device} and images on {images.device}; they must share a device")
