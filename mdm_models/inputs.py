"""Whether what a user gives a model fits it."""

from torch import Tensor

from mdm_kernels.arguments import check_optional_tensors, check_tensor_lists, check_tensors
from mdm_models.config import UNetConfig


def check_inputs(config: UNetConfig, x: list[Tensor], time: Tensor) -> None:
    """Raises ValueError that names the first of the noisy inputs and their time that does not fit the model, TypeError
    for what are no tensors, and for a time whose dtype rounds it."""
    check_tensor_lists(x=x)
    check_tensors(time=time)
    levels = config.levels
    if len(x) != len(levels):
        raise ValueError(
            f"x has {len(x)} tensors; this model takes {len(levels)}, one a level, highest resolution first"
        )
    batch = x[-1].shape[0]
    dims = 5 if config.is_video else 4
    for i, (level, tensor) in enumerate(zip(levels, x, strict=True)):
        shape = tuple(tensor.shape)
        if tensor.dim() != dims and not (i == len(levels) - 1 and tensor.dim() == 4):
            layout = "(B, C, T, H, W)" if dims == 5 else "(B, C, H, W)"
            raise ValueError(f"x[{i}] has shape {shape}; it must be {layout}")
        if shape[1] != config.image_channels:
            raise ValueError(f"x[{i}] has shape {shape}; this model takes {config.image_channels} channels")
        if not shape[0]:
            raise ValueError(f"x[{i}] has shape {shape}; every level needs a row, that of the first sample")
        if i + 1 < len(x) and shape[0] > x[i + 1].shape[0]:
            raise ValueError(f"x[{i}] has {shape[0]} rows, more than the {x[i + 1].shape[0]} of the level inside it")
        _check_size(i, level, shape)
        if i and _size(shape) != (expected := _inner_size(levels[i - 1], tuple(x[i - 1].shape))):
            raise ValueError(
                f"x[{i}] has shape {shape}; with x[{i - 1}] as given its (frames, height, width) must be {expected}"
            )
    if tuple(time.shape) != (batch,):
        raise ValueError(
            f"time has shape {tuple(time.shape)}; it must be ({batch},), one a sample of the lowest resolution"
        )
    _check_exact("time", time)


def check_condition(
    config: UNetConfig, batch: int, context: Tensor | None, context_mask: Tensor | None, micro: dict[str, Tensor]
) -> None:
    """Raises ValueError that names the first condition that does not fit the model or the batch, TypeError for what
    are no tensors, and for a micro-condition whose dtype rounds it."""
    check_optional_tensors(context=context, context_mask=context_mask)
    if not isinstance(micro, dict):
        raise TypeError(f"micro is {type(micro).__name__}; it must be a dict of tensors, by name")
    check_tensors(**{f"micro[{name!r}]": value for name, value in micro.items()})
    _check_context(config.innermost, batch, context, context_mask)
    known = {name for level in config.levels for name, _ in level.micro}
    for name, value in micro.items():
        if name not in known:
            raise ValueError(f"micro has {name!r}; this model knows {', '.join(sorted(known)) or 'none'}")
        if tuple(value.shape) != (batch,):
            raise ValueError(f"micro[{name!r}] has shape {tuple(value.shape)}; it must be ({batch},)")
        _check_exact(f"micro[{name!r}]", value)


def _check_exact(name: str, value: Tensor) -> None:
    """Raises TypeError for a dtype in which time 999 is 1000."""
    if value.is_floating_point() and value.dtype.itemsize < 4:
        raise TypeError(f"{name} is {value.dtype}, which rounds it; it must be float32, float64 or whole numbers")


def _size(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, height, width) of an image's or a clip's shape."""
    *_, height, width = shape
    return shape[2] if len(shape) == 5 else 1, height, width


def _inner_size(outer: UNetConfig, shape: tuple[int, ...]) -> tuple[int, int, int]:
    time, space = outer.nest_stride
    frames, height, width = _size(shape)
    return frames // time, height // space, width // space


def _check_size(i: int, level: UNetConfig, shape: tuple[int, ...]) -> None:
    frames, height, width = _size(shape)
    ratio = 2 ** (len(level.channels) - 1)
    if level.kind == "time":
        if frames % ratio:
            raise ValueError(f"x[{i}] has shape {shape}; its number of frames must be a multiple of {ratio}")
        if any(level.temporal_attention) and (height % 2 or width % 2):
            raise ValueError(f"x[{i}] has shape {shape}; temporal attention needs an even height and width")
    elif height % ratio or width % ratio:
        raise ValueError(f"x[{i}] has shape {shape}; its height and width must be multiples of {ratio}")
    if level.inner is None and frames != 1:
        raise ValueError(f"x[{i}] has shape {shape}; the innermost level sees one frame")


def _check_context(innermost: UNetConfig, batch: int, context: Tensor | None, mask: Tensor | None) -> None:
    if not innermost.context_dim:
        if context is not None:
            raise ValueError("context was given to an unconditional model")
        return
    if context is None:
        raise ValueError(f"context is missing; this model takes (B, S, {innermost.context_dim}) text features")
    if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != innermost.context_dim:
        raise ValueError(f"context has shape {tuple(context.shape)}; it must be ({batch}, S, {innermost.context_dim})")
    if mask is not None and mask.shape != context.shape[:2]:
        raise ValueError(f"context_mask has shape {tuple(mask.shape)}; it must be {tuple(context.shape[:2])}")
