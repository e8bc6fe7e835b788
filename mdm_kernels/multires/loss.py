"""multires_loss: the loss of the predictions of every level, and in the same pass what their gradient needs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_kernels import backend
from mdm_kernels.library import Derivative, below_autograd, define, register_derivative
from mdm_kernels.multires import reference
from mdm_kernels.multires.checks import (
    Stride,
    check_alpha_bars,
    check_loss_spaces,
    check_no_gradient,
    check_noise,
    checked_rows,
    checked_strides,
    checked_weights,
)
from mdm_kernels.multires.levels import (
    dense_format,
    fits,
    has_whole_pixels,
    is_channels_last,
    philox_key,
    plan_levels,
    split_seed,
)


@define(
    "multires_loss_forward(Tensor[] preds, Tensor images, Tensor alpha_bars, int[] time_strides, int[] space_strides, "
    "Tensor[] noise, SymInt? seed, Tensor? device_seed, str prediction, str loss_target, float[] weights, "
    "bool with_residuals) -> (Tensor, Tensor[])"
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
) -> tuple[Tensor, list[Tensor]]:
    """The loss (B,) and, if wanted, pred − target of every level in the predictions' dtype and memory format.

    The residual rather than the gradient is kept: it is of order 1 whatever the image's size, ᾱ and the weights, so
    that float16 holds it.
    """
    preds = [pred.contiguous(memory_format=dense_format(pred)) for pred in preds]
    residuals = [torch.empty_like(pred) for pred in preds] if with_residuals else []
    if backend.shapes_only(images):
        return torch.empty(images.shape[0], dtype=torch.float32, device=images.device), residuals
    from mdm_kernels.multires import kernels

    alpha_bars = alpha_bars.float().contiguous()
    strides = list(zip(time_strides, space_strides, strict=True))
    levels = plan_levels(images, strides, [pred.shape[0] for pred in preds])
    # One number a tile; zeros, since a mixed batch leaves some tiles without a prediction.
    tiles = sum(level.tiles for level in levels)
    partials = torch.zeros(images.shape[0], tiles, dtype=torch.float32, device=images.device)
    for i, (level, pred) in enumerate(zip(levels, preds, strict=True)):
        backend.launch(
            kernels.loss_level,
            (level.image.shape[0] * level.tiles,),
            pred,
            level.image,
            noise[i].contiguous(memory_format=dense_format(images)) if noise else None,
            alpha_bars[i],
            residuals[i] if with_residuals else None,
            level.pooled,
            partials,
            device_seed,
            *philox_key(seed),
            reference.level_word(strides[i]),
            pred.shape[0],
            weights[i] / max(pred.shape[1:].numel(), 1),
            partials.shape[1],
            sum(before.tiles for before in levels[:i]),
            level.channels,
            level.frames,
            level.height,
            level.width,
            SEEDED=not noise,
            PREDICTION=prediction,
            LOSS_TARGET=loss_target,
            SMALLEST_DENOMINATOR=reference.SMALLEST_DENOMINATOR,
            WITH_RESIDUAL=with_residuals,
            IMAGE_LAST=is_channels_last(images),
            PRED_LAST=is_channels_last(pred),
            PRED_PIXELS=has_whole_pixels(pred),
            POOL=level.pooled is not None,
            TIME_RATIO=level.time_ratio,
            SPACE_RATIO=level.space_ratio,
            BLOCK_H=level.block_h,
            BLOCK_W=level.block_w,
            num_warps=4,
        )
    return partials.sum(1), residuals


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
    """The gradients of the predictions, from their residuals and the gradient `upstream` (B,) of the loss."""
    gradients = [torch.empty_like(residual) for residual in residuals]
    if backend.shapes_only(upstream):
        return gradients
    from mdm_kernels.multires import kernels

    upstream, alpha_bars = upstream.float().contiguous(), alpha_bars.float().contiguous()
    for i, (residual, gradient) in enumerate(zip(residuals, gradients, strict=True)):
        elements = residual.shape[1:].numel()
        backend.launch(
            kernels.residual_gradient,
            (residual.shape[0] * -(-elements // kernels.GRADIENT_BLOCK),),
            residual,
            upstream,
            alpha_bars[i],
            gradient,
            weights[i] / max(elements, 1),
            elements,
            PREDICTION=prediction,
            LOSS_TARGET=loss_target,
            SMALLEST_DENOMINATOR=reference.SMALLEST_DENOMINATOR,
            BLOCK=kernels.GRADIENT_BLOCK,
            num_warps=4,
        )
    return gradients


class _MultiresLoss(Derivative):
    """The loss and the residuals as functions of the predictions; `arguments` are the other ones of the op."""

    @staticmethod
    def forward(ctx, arguments, *preds):
        loss, residuals = below_autograd(_loss_forward, list(preds), *arguments, True)
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
        return None, *gradients


def _differentiable_loss(preds, images, alpha_bars, *arguments):
    """The op where a gradient is wanted: it keeps the residuals, whether or not the caller asked for them."""
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=arguments[2])
    *arguments, with_residuals = arguments
    loss, *residuals = _MultiresLoss.apply((images, alpha_bars, *arguments), *preds)
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
) -> Tensor:
    """Per sample, the weighted sum over levels of the mean squared error of `preds` → (B,) float32.

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
    if fits(images, *preds) and backend.runs_triton(images):
        times, spaces = map(list, zip(*strides, strict=True))
        loss, _ = _loss_forward(
            list(preds), images, alpha_bars, times, spaces, list(noise or []), *split_seed(seed),
            prediction, loss_target, weights, False,
        )  # fmt: skip
        return loss
    if noise is None:
        noise = reference.seeded_noise(images, strides, seed)
    return reference.loss(preds, images, alpha_bars, strides, noise, prediction, loss_target, weights)
