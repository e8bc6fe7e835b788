"""multires_noise and multires_loss: noising and the loss at every resolution of a batch.

Signatures, shapes and the counter-based noise are those of `reference.py`.
"""

from collections.abc import Sequence

from torch import Tensor

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


def multires_noise(
    images: Tensor,
    alpha_bars: Tensor,
    strides: Sequence[Stride],
    noise: Sequence[Tensor] | None = None,
    *,
    seed: int | None = None,
) -> list[Tensor]:
    """x_t = √ᾱ·x + √(1−ᾱ)·ε at every level, x being the image at that level's resolution.

    images (B, C, H, W) or (B, C, T, H, W), float32, float16, bfloat16 or float64. strides: one a level, an int or
    (time, space): the level keeps every `time`-th frame and averages `space`×`space` pixels; H, W and T must divide.
    alpha_bars (levels, B) float32. noise: one tensor a level, of its shape; or instead seed in 0…2⁶³−1, which stands
    for the noise that `reference.philox_normal` defines: the same in `multires_loss`, on every device and backend (to
    float32 rounding), and never stored.

    Returns a list of x_t, one a level, in the images' dtype and memory format. Nothing is differentiated: an argument
    that requires a gradient raises ValueError, as do shapes that do not fit; wrong dtypes raise TypeError.
    """
    strides = checked_strides(images, strides)
    check_alpha_bars(images, alpha_bars, len(strides))
    check_noise(images, strides, noise, seed)
    check_no_gradient(images=images, alpha_bars=alpha_bars, noise=noise)
    if noise is None:
        noise = reference.seeded_noise(images, strides, seed)
    return reference.noised(images, alpha_bars, strides, noise)


def multires_loss(
    preds: Sequence[Tensor],
    images: Tensor,
    alpha_bars: Tensor,
    strides: Sequence[Stride],
    noise: Sequence[Tensor] | None = None,
    *,
    seed: int | None = None,
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
    if noise is None:
        noise = reference.seeded_noise(images, strides, seed)
    return reference.loss(preds, images, alpha_bars, strides, noise, prediction, loss_target, weights)
