"""group_norm_silu: registration → autograd → public function → module."""

import torch
from torch import Tensor, nn

from .. import arguments, backend
from ..layouts import concatenated, dense, empty, is_channels_last
from ..library import Derivative, below_autograd, define, register_derivative
from . import cpu, launch, reference
from .checks import check_arguments, check_channels, check_options


@define(
    "group_norm_silu_forward(Tensor x, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, float eps, bool silu) -> (Tensor, Tensor, Tensor)"
)
def _forward(x: Tensor, skip: Tensor | None, num_groups: int, weight, bias, scale, shift, eps: float, silu: bool):
    """y in x's memory format; mean less the group's first element, and rstd, both (N, num_groups) in float32."""
    channels_last = is_channels_last(x)
    x, skip = dense(x, channels_last), None if skip is None else dense(skip, channels_last)
    y = empty(x, x.shape[1] + (0 if skip is None else skip.shape[1]), channels_last)
    mean, rstd = (torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if not backend.shapes_only(x) and y.numel():
        launch.forward(x, skip, y, mean, rstd, num_groups, weight, bias, scale, shift, eps, silu)
    return y, mean, rstd


@define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor? skip, Tensor mean, Tensor rstd, int num_groups, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(
    dy: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int,
    weight, bias, scale, shift, silu: bool,
):  # fmt: skip
    """Gradients of x, skip, weight, bias, scale, shift, each in its tensor's dtype; an empty one for what is None."""
    channels_last = is_channels_last(x)
    x, dy = dense(x, channels_last), dense(dy, channels_last)
    skip = None if skip is None else dense(skip, channels_last)
    dx = empty(x, x.shape[1], channels_last)
    dskip = None if skip is None else empty(x, skip.shape[1], channels_last)
    gradients = [
        None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        for tensor in (weight, bias, scale, shift)
    ]
    if not backend.shapes_only(x):
        parameters = weight, bias, scale, shift
        launch.backward(dy, x, skip, dx, dskip, mean, rstd, num_groups, *parameters, *gradients, silu)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, dskip, *gradients))


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
    """Compute act(GroupNorm(x)·(1 + scale) + shift), Wu & He 2018 (arXiv 1803.08494) with FiLM modulation and SiLU.

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
    if not backend.runs_triton(x, fits=x.dtype != torch.float64):
        way = cpu if cpu.pays(x, skip, weight, bias, scale, shift) else reference
        return reference.group_norm_silu(
            x, num_groups, weight, bias, eps, skip, scale, shift, activation, way.normalised
        )
    if skip is not None and not _kernels_take_a_skip():
        x, skip = concatenated(x, skip), None
    y, _, _ = _forward(x, skip, num_groups, weight, bias, scale, shift, eps, activation == "silu")
    return y


class GroupNormSiLU(nn.GroupNorm):
    """`group_norm_silu` as an nn.GroupNorm: its parameters, its state dict. `num_channels` counts those of a skip.

    input (N, C, *spatial), scale and shift (N / T, num_channels), skip (N, num_channels − C, *spatial) → (N,
    num_channels, *spatial) in the input's dtype and memory format. Errors as for the function, whose x it is.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = "silu",
        device=None,
        dtype=None,
    ):
        check_options(num_groups, eps, activation)
        arguments.check_ints(num_channels=num_channels)
        arguments.check_bools(affine=affine)
        if num_channels < 1:
            raise ValueError(f"num_channels is {num_channels}; it must be at least 1")
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        check_channels(input, skip, self.num_channels)
        return group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps,
            skip=skip, scale=scale, shift=shift, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
