"""multires_noise, the noisy images of every level in one pass over the full-resolution image; and multires_loss, the
loss of the predictions of every level and, in the same pass, what their gradient needs. Each: registration → autograd →
public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..layouts import dense_format
from ..library import Derivative, below_autograd, define, register_derivative
from . import launch, reference
from .checks import (
    Stride,
    check_alpha_bars,
    check_loss_spaces,
    check_no_gradient,
    check_noise,
    checked_rows,
    checked_strides,
    checked_weights,
    level_shape,
)


@define(
    "multires_noise(Tensor images, Tensor alpha_bars, int[] time_strides, int[] space_strides, Tensor[] noise, "
    "SymInt? seed, Tensor? device_seed) -> Tensor[]"
)
def _noise(
    images: Tensor,
    alpha_bars: Tensor,
    time_strides: list[int],
    space_strides: list[int],
    noise: list[Tensor],
    seed: int | None,
    device_seed: Tensor | None,
) -> list[Tensor]:
    """x_t of every level in the images' dtype and memory format; noise is empty where a seed stands for it."""
    strides = list(zip(time_strides, space_strides, strict=True))
    memory_format = dense_format(images)
    x_t = [
        torch.empty(level_shape(images, s), dtype=images.dtype, device=images.device, memory_format=memory_format)
        for s in strides
    ]
    if not backend.shapes_only(images):
        launch.noise(images, alpha_bars, strides, noise, seed, device_seed, x_t)
    return x_t


def multires_noise(
    images: Tensor,
    alpha_bars: Tensor,
    strides: Sequence[Stride],
    noise: Sequence[Tensor] | None = None,
    *,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    """Noise images at every level: x_t = √ᾱ·x + √(1−ᾱ)·ε, x being the image at that level's resolution.

    images (B, C, H, W) or (B, C, T, H, W), float32, float16, bfloat16 or float64. strides: one a level, an int or
    (time, space): the level keeps every `time`-th frame and averages `space`×`space` pixels; H, W and T must divide.
    alpha_bars (levels, B) float32. noise: one tensor a level, of its shape; or instead seed in 0…2⁶³−1, which stands
    for the noise that `reference.philox_normal` defines: the same in `multires_loss`, on every device and backend (to
    float32 rounding), and never stored. The seed is an int, or a tensor of one int64 on the images' device that the
    kernel reads when it runs, so that a captured CUDA graph draws new noise after `seed.add_(1)`.

    Returns a list of x_t, one a level, in the images' dtype and memory format. Nothing is differentiated: an argument
    that requires a gradient raises ValueError, as do shapes that do not fit; wrong dtypes raise TypeError.
    """
    strides = checked_strides(images, strides)
    check_alpha_bars(images, alpha_bars, len(strides))
    check_noise(images, strides, noise, seed)
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=noise)
    if backend.runs_triton(images, fits=launch.fits(images)):
        times, spaces = map(list, zip(*strides, strict=True))
        return _noise(images, alpha_bars, times, spaces, list(noise or []), *launch.split_seed(seed))
    given = list(noise or []) if seed is None else reference.seeded_noise(images, strides, seed)
    return reference.noised(images, alpha_bars, strides, given)


@define(
    "multires_loss_forward(Tensor[] preds, Tensor images, Tensor alpha_bars, int[] time_strides, int[] space_strides, "
    "Tensor[] noise, SymInt? seed, Tensor? device_seed, str prediction, str loss_target, float[] weights, "
    "bool with_residuals, bool per_level=False) -> (Tensor, Tensor[])"
)
def _loss_forward(
    preds: list[Tensor],
    images: Tensor,
    alpha_bars: Tensor,
    time_strides: list[int],
    space_strides: list[int],
    noise: list[Tensor],
    seed: int | None,
    device_seed: Tensor | None,
    prediction: str,
    loss_target: str,
    weights: list[float],
    with_residuals: bool,
    per_level: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The loss (B,), or each level's (levels, B), and, if wanted, pred − target of every level in the predictions'
    dtype and memory format.

    The residual rather than the gradient is kept: it is of order 1 whatever the image's size, ᾱ and the weights, so
    that float16 holds it.
    """
    preds = [pred.contiguous(memory_format=dense_format(pred)) for pred in preds]
    residuals = [torch.empty_like(pred) for pred in preds] if with_residuals else []
    if backend.shapes_only(images):
        shape = (len(preds), images.shape[0]) if per_level else images.shape[:1]
        return torch.empty(shape, dtype=torch.float32, device=images.device), residuals
    strides = list(zip(time_strides, space_strides, strict=True))
    spaces = {"PREDICTION": prediction, "LOSS_TARGET": loss_target}
    losses = launch.loss_forward(
        preds, images, alpha_bars, strides, noise, seed, device_seed, spaces, weights, residuals, per_level
    )
    return losses, residuals


@define(
    "multires_loss_backward(Tensor[] residuals, Tensor upstream, Tensor alpha_bars, str prediction, str loss_target, "
    "float[] weights) -> Tensor[]"
)
def _loss_backward(
    residuals: list[Tensor],
    upstream: Tensor,
    alpha_bars: Tensor,
    prediction: str,
    loss_target: str,
    weights: list[float],
) -> list[Tensor]:
    """The gradients of the predictions, from their residuals and the gradient `upstream` (B,) or (levels, B) of the
    loss."""
    gradients = [torch.empty_like(residual) for residual in residuals]
    if not backend.shapes_only(upstream):
        spaces = {"PREDICTION": prediction, "LOSS_TARGET": loss_target}
        launch.loss_backward(residuals, upstream, alpha_bars, spaces, weights, gradients)
    return gradients


class _MultiresLoss(Derivative):
    """The loss and the residuals as functions of the predictions; `arguments` are the other ones of the op."""

    @staticmethod
    def forward(ctx, arguments, per_level, *preds):
        loss, residuals = below_autograd(_loss_forward, list(preds), *arguments, True, per_level)
        _, alpha_bars, *_, prediction, loss_target, weights = arguments
        ctx.save_for_backward(alpha_bars, *residuals)
        ctx.spaces = prediction, loss_target, weights
        ctx.set_materialize_grads(False)
        return loss, *residuals

    @staticmethod
    def backward(ctx, upstream, *residual_gradients):
        alpha_bars, *residuals = ctx.saved_tensors
        gradients = residual_gradients
        if upstream is not None:
            gradients = _loss_backward(residuals, upstream, alpha_bars, *ctx.spaces)
            pairs = zip(gradients, residual_gradients, strict=True)  # a residual changes as its prediction does
            gradients = [gradient if more is None else gradient + more for gradient, more in pairs]
        return None, None, *gradients


def _differentiable_loss(
    preds, images, alpha_bars, times, spaces, noise, seed, device_seed, prediction, loss_target, weights,
    with_residuals, per_level=False,
):  # fmt: skip
    """The op where a gradient is wanted: it keeps the residuals, whether or not the caller asked for them."""
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=noise)
    arguments = images, alpha_bars, times, spaces, noise, seed, device_seed, prediction, loss_target, weights
    loss, *residuals = _MultiresLoss.apply(arguments, per_level, *preds)
    return loss, residuals if with_residuals else []


register_derivative(_loss_forward, _differentiable_loss)


def multires_loss(
    preds: Sequence[Tensor],
    images: Tensor,
    alpha_bars: Tensor,
    strides: Sequence[Stride],
    noise: Sequence[Tensor] | None = None,
    *,
    seed: int | Tensor | None = None,
    prediction: str = "v",
    loss_target: str = "eps",
    weights: Sequence[float] | None = None,
    rows: Sequence[int] | None = None,
    per_level: bool = False,
) -> Tensor:
    """Give, per sample, the weighted sum over levels of the mean squared error of `preds` → (B,) float32; with
    per_level its terms, (levels, B).

    images, alpha_bars, strides, noise and seed are those of `multires_noise`. preds: one a level, of its shape, any
    float dtype; what they predict is `prediction`, and the error is measured in `loss_target`, each "v", "eps" or "x0"
    (`reference.loss_factor`). weights: one a level, default 1. rows: how many leading samples each level has (a mixed
    batch), default all; preds[i] then has rows[i] samples, noise[i] still all, and the other samples get nothing from
    that level.

    The gradient reaches preds alone, once: anything else that requires one, and shapes that do not fit, raise
    ValueError; wrong dtypes raise TypeError.
    """
    strides = checked_strides(images, strides)
    check_alpha_bars(images, alpha_bars, len(strides))
    check_noise(images, strides, noise, seed)
    check_loss_spaces(prediction, loss_target)
    rows = checked_rows(images, strides, preds, rows)
    weights = checked_weights(weights, len(strides))
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=noise)
    if backend.runs_triton(images, fits=launch.fits(images, *preds)):
        times, spaces = map(list, zip(*strides, strict=True))
        loss, _ = _loss_forward(
            list(preds), images, alpha_bars, times, spaces, list(noise or []), *launch.split_seed(seed),
            prediction, loss_target, weights, False, per_level,
        )  # fmt: skip
        return loss
    given = list(noise or []) if seed is None else reference.seeded_noise(images, strides, seed)
    terms = reference.loss_terms(preds, images, alpha_bars, strides, given, prediction, loss_target, weights)
    return terms if per_level else terms.sum(0)
