"""group_norm_silu: checks → launches → autograd → public function → module."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import arguments, backend
from ..library import Derivative, below_autograd, define, register_derivative
from . import reference
from .checks import check_arguments, check_options
from .reference import concatenated, is_channels_last


class _Problem(NamedTuple):
    """What the launches of one call share."""

    groups: int
    """groups of all rows, N·G: one program each where a group is a program's work"""
    shape: tuple[int, int, int, int]
    """kernel arguments: G, the positions S, the x rows that one row of scale and shift serves, the skip's channels"""
    transform: tuple
    """kernel arguments: weight, bias, scale, shift, row strides of scale and shift"""
    constants: dict
    """CHANNELS (of a group) and CHANNELS_LAST"""

    @classmethod
    def of(cls, x: Tensor, skip: Tensor | None, num_groups: int, weight, bias, scale, shift) -> "_Problem":
        scale, shift = (film if film is None or film.stride(1) == 1 else film.contiguous() for film in (scale, shift))
        film_rows = next((film.shape[0] for film in (scale, shift) if film is not None), x.shape[0])
        strides = [0 if film is None else film.stride(0) for film in (scale, shift)]
        weight, bias = (tensor if tensor is None else tensor.contiguous() for tensor in (weight, bias))
        return cls(
            groups=x.shape[0] * num_groups,
            shape=(num_groups, math.prod(x.shape[2:]), x.shape[0] // max(film_rows, 1), _channels(skip)),
            transform=(weight, bias, scale, shift, *strides),
            constants={"CHANNELS": _channels(x, skip) // num_groups, "CHANNELS_LAST": is_channels_last(x)},
        )


def _channels(*tensors: Tensor | None) -> int:
    return sum(tensor.shape[1] for tensor in tensors if tensor is not None)


def _dense(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """x itself if it is dense in that memory format, a copy otherwise."""
    if x is None:
        return None
    if not channels_last:
        return x.contiguous()
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def _empty(x: Tensor, channels: int, channels_last: bool) -> Tensor:
    """A tensor like x, but for its channels, dense in that memory format."""
    rows, _, *spatial = x.shape
    if channels_last:
        return x.new_empty(rows, *spatial, channels).movedim(-1, 1)
    return x.new_empty(rows, channels, *spatial)


def _float32(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@define(
    "group_norm_silu_forward(Tensor x, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, float eps, bool silu) -> (Tensor, Tensor, Tensor)"
)
def _forward(x, skip, num_groups, weight, bias, scale, shift, eps, silu):
    """y in x's memory format; mean less the group's first element, and rstd, both (N, num_groups) in float32."""
    channels_last = is_channels_last(x)
    x, skip = _dense(x, channels_last), _dense(skip, channels_last)
    y = _empty(x, _channels(x, skip), channels_last)
    mean, rstd = (_float32(x.shape[0], num_groups, like=x) for _ in range(2))
    if backend.shapes_only(x) or y.numel() == 0:
        return y, mean, rstd
    from . import kernels, tiled

    problem = _Problem.of(x, skip, num_groups, weight, bias, scale, shift)
    _, positions, *_ = problem.shape
    whole_group = kernels.whole_group_launch(*problem.shape[:2], x.itemsize, **problem.constants)
    if whole_group is not None:
        backend.launch(
            kernels.group_forward, (problem.groups,), x, skip, y, mean, rstd, *problem.transform, *problem.shape, eps,
            SILU=silu, **problem.constants, **whole_group,
        )  # fmt: skip
        return y, mean, rstd
    launch, grid, tiles = tiled.tile_launch(*y.shape[:2], positions, channels_last)
    means, deviations = (_float32(x.shape[0], tiles, y.shape[1], like=x) for _ in range(2))
    backend.launch(
        tiled.tile_statistics, grid, x, skip, means, deviations, *problem.shape, tiles, **problem.constants, **launch
    )
    backend.launch(
        tiled.combine_statistics, (problem.groups,), means, deviations, mean, rstd, *problem.shape, tiles, eps,
        **tiled.combine_statistics_launch(problem.constants["CHANNELS"], tiles, launch),
    )  # fmt: skip
    backend.launch(
        tiled.apply_forward, grid, x, skip, y, mean, rstd, *problem.transform, *problem.shape, tiles,
        SILU=silu, **problem.constants, **launch,
    )  # fmt: skip
    return y, mean, rstd


@define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor? skip, Tensor mean, Tensor rstd, int num_groups, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(dy, x, skip, mean, rstd, num_groups, weight, bias, scale, shift, silu):
    """Gradients of x, skip, weight, bias, scale, shift, each in its tensor's dtype; an empty one for what is None."""
    channels_last = is_channels_last(x)
    x, skip, dy = (_dense(tensor, channels_last) for tensor in (x, skip, dy))
    dx = _empty(x, x.shape[1], channels_last)
    dskip = x.new_empty(0) if skip is None else _empty(x, skip.shape[1], channels_last)
    gradients = [
        x.new_empty(0) if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        for tensor in (weight, bias, scale, shift)
    ]
    if backend.shapes_only(x):
        return dx, dskip, *gradients
    problem = _Problem.of(x, skip, num_groups, weight, bias, scale, shift)
    sums = [_float32(*dy.shape[:2], like=x) for _ in range(2)]  # over positions, of du and of du·x̂
    if dy.numel() == 0:
        sums = [total.zero_() for total in sums]
    else:
        _launch_dx(problem, dy, x, skip, dx, None if skip is None else dskip, mean, rstd, sums, silu)
    _launch_parameter_gradients(problem, sums, gradients)
    return dx, dskip, *gradients


def _launch_dx(problem: _Problem, dy, x, skip, dx, dskip, mean, rstd, sums, silu) -> None:
    """Write dx and dskip, and the sums (N, C) that the other gradients follow from."""
    from . import kernels, tiled

    _, positions, *_ = problem.shape
    inputs = (dy, x, skip)
    whole_group = kernels.whole_group_launch(*problem.shape[:2], x.itemsize, **problem.constants)
    if whole_group is not None:
        backend.launch(
            kernels.group_backward, (problem.groups,), *inputs, dx, dskip, mean, rstd, *sums,
            *problem.transform, *problem.shape, SILU=silu, **problem.constants, **whole_group,
        )  # fmt: skip
        return
    launch, grid, tiles = tiled.tile_launch(*dy.shape[:2], positions, problem.constants["CHANNELS_LAST"])
    tile_sums = [_float32(dy.shape[0], tiles, dy.shape[1], like=x) for _ in range(2)]
    group_means = [torch.empty_like(mean) for _ in range(2)]
    backend.launch(
        tiled.tile_gradient_sums, grid, *inputs, mean, rstd, *tile_sums, *problem.transform, *problem.shape, tiles,
        SILU=silu, **problem.constants, **launch,
    )  # fmt: skip
    backend.launch(
        tiled.combine_gradient_sums, (problem.groups,), *tile_sums, *sums, *group_means, *problem.transform,
        *problem.shape, tiles, **tiled.combine_gradients_launch(problem.constants["CHANNELS"], tiles),
    )  # fmt: skip
    backend.launch(
        tiled.apply_backward, grid, *inputs, dx, dskip, mean, rstd, *group_means, *problem.transform, *problem.shape,
        tiles, SILU=silu, **problem.constants, **launch,
    )  # fmt: skip


def _launch_parameter_gradients(problem: _Problem, sums, gradients) -> None:
    """Write dweight, dbias (C,) and dscale, dshift (N / T, C) from the sums (N, C) of du and du·x̂."""
    from . import kernels

    weight, bias, scale, _, scale_stride, _ = problem.transform
    rows, channels = sums[0].shape
    _, _, frames, _ = problem.shape
    dweight, dbias, dscale, dshift = (None if g.numel() == 0 else g for g in gradients)
    if dweight is not None or dbias is not None:
        launch, grid = kernels.affine_launch(rows, channels)
        backend.launch(
            kernels.affine_gradients, grid, *sums, dweight, dbias, scale, scale_stride, rows, channels, frames, **launch
        )
    if dscale is not None or dshift is not None:
        film_rows = (dshift if dscale is None else dscale).shape[0]
        launch, grid = kernels.film_launch(film_rows, channels, frames)
        backend.launch(
            kernels.film_gradients, grid, *sums, dscale, dshift, weight, bias, channels, frames, **launch
        )


class _GroupNormSiLU(Derivative):
    @staticmethod
    def forward(ctx, x, skip, num_groups, weight, bias, scale, shift, eps, silu):
        y, mean, rstd = below_autograd(_forward, x, skip, num_groups, weight, bias, scale, shift, eps, silu)
        ctx.save_for_backward(x, skip, mean, rstd, weight, bias, scale, shift)
        ctx.num_groups, ctx.silu = num_groups, silu
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        x, skip, mean, rstd, *parameters = ctx.saved_tensors
        dx, dskip, *gradients = _backward(dy, x, skip, mean, rstd, ctx.num_groups, *parameters, ctx.silu)
        gradients = [None if tensor is None else g for tensor, g in zip(parameters, gradients, strict=True)]
        return dx, None if skip is None else dskip, None, *gradients, None, None


register_derivative(_forward, _GroupNormSiLU.apply)


def _kernels_take_a_skip() -> bool:
    """On AMD GPUs, Triton 3.6 aborts where a pointer is chosen between two tensors; 3.9 does not."""
    if torch.version.hip is None:
        return True
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """act(GroupNorm(x)·(1 + scale) + shift), Wu & He 2018 (arXiv 1803.08494) with FiLM modulation and SiLU.

    Args:
        x: (N, C, *spatial), float32, float16, bfloat16 or float64 (which the PyTorch reference always computes).
        num_groups: groups of C / num_groups channels, each normalised by its own mean and biased variance.
        weight, bias: (C,), any floating dtype; None: 1 and 0.
        eps: added to the variance.
        skip: (N, C', *spatial) in x's dtype, such as what the way down of a UNet hands to the way up: the result is
            that of torch.cat([x, skip], 1), which the kernels never make, and C everywhere else is C + C'. A group may
            hold channels of both. In another memory format than x it is copied.
        scale, shift: (N / T, C), any floating dtype; row i serves the T rows i·T … i·T + T − 1 of x (the frames of a
            clip; T = 1 for images). None: 0.
        activation: "silu", or None for none.

    Returns:
        A tensor (N, C, *spatial) of x's dtype and memory format (contiguous or channels-last). Statistics are float32,
        under autocast too. Gradients have their tensor's dtype; second derivatives raise.

    Raises:
        TypeError: a tensor of another dtype. ValueError: shapes that do not fit, several devices, another activation.
    """
    check_arguments(x, skip, num_groups, weight, bias, eps, scale, shift, activation)
    if x.dtype == torch.float64 or not backend.runs_triton(x):
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, skip, scale, shift, activation)
    if skip is not None and not _kernels_take_a_skip():
        x, skip = concatenated(x, skip), None
    y, _, _ = _forward(x, skip, num_groups, weight, bias, scale, shift, eps, activation == "silu")
    return y


class GroupNormSiLU(nn.GroupNorm):
    """`group_norm_silu` as an nn.GroupNorm: its parameters, its state dict. `num_channels` counts those of a skip."""

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, activation="silu", device=None, dtype=None):
        check_options(num_groups, eps, activation)
        arguments.check_ints(num_channels=num_channels)
        arguments.check_bools(affine=affine)
        if num_channels < 1:
            raise ValueError(f"num_channels is {num_channels}; it must be at least 1")
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps,
            skip=skip, scale=scale, shift=shift, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
