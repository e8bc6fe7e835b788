"""Multi-resolution noising and loss in plain PyTorch: the definition, the oracle of the tests, and the CPU path.

With a = √ᾱ and s = √(1−ᾱ), level ℓ of an image holds x_t = a·x + s·ε, where x is the image at that level's resolution.
A network predicts v = a·ε − s·x, ε or x itself (Salimans & Ho 2022, section 4): each is c_x·x + c_n·ε, and since x_t is
known, an error in one of them is an error in another times a factor of ᾱ alone. So every kind of prediction and every
space of the loss is one affine form and one weight per (level, sample).

Everything is computed in float32, or in float64 if the images are float64.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTIONS = ("v", "eps", "x0")
SMALLEST_DENOMINATOR = 1e-12  # keeps the loss finite at ᾱ = 0 and ᾱ = 1, where a change of space divides by zero


def working_dtype(x: Tensor) -> torch.dtype:
    """Give float64 for float64, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def level_image(images: Tensor, stride: tuple[int, int]) -> Tensor:
    """Bring images (B, C, H, W) or clips (B, C, T, H, W) to one level: the first frame of every `time`, averaged over
    `space`×`space` pixels. In the working dtype."""
    time, space = stride
    images = images.to(working_dtype(images))
    if images.dim() == 5:
        images = images[:, :, ::time]
    if space == 1 or images.numel() == 0:  # torch pools no image without pixels
        return images[..., ::space, ::space]
    return F.avg_pool2d(images, space) if images.dim() == 4 else F.avg_pool3d(images, (1, space, space))


def target_coefficients(alpha_bar: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Give (c_x, c_n) of the target c_x·x + c_n·ε of a prediction of "v", "eps" or "x0", in alpha_bar's shape."""
    one, zero = torch.ones_like(alpha_bar), torch.zeros_like(alpha_bar)
    return {"v": (-(1 - alpha_bar).sqrt(), alpha_bar.sqrt()), "eps": (zero, one), "x0": (one, zero)}[prediction]


def loss_factor(alpha_bar: Tensor, prediction: str, loss_target: str) -> Tensor:
    """Give what turns a squared error of the prediction into the squared error of the loss target it implies at fixed
    x_t.

    It is the ratio of error_scale²: an error δ in v moves ε by √ᾱ·δ and x by −√(1−ᾱ)·δ. The denominator is kept above
    SMALLEST_DENOMINATOR.
    """
    if prediction == loss_target:
        return torch.ones_like(alpha_bar)
    squared_size = {"v": torch.ones_like(alpha_bar), "eps": alpha_bar, "x0": 1 - alpha_bar}  # of an error of 1 in v
    return squared_size[loss_target] / squared_size[prediction].clamp_min(SMALLEST_DENOMINATOR)


def noised(images: Tensor, alpha_bars: Tensor, strides: list[tuple[int, int]], noise: Sequence[Tensor]) -> list[Tensor]:
    """Give x_t of every level in the images' dtype; alpha_bars (levels, B), noise one tensor a level."""
    levels = []
    for alpha_bar, stride, eps in zip(alpha_bars, strides, noise, strict=True):
        x = level_image(images, stride)
        alpha_bar = _per_sample(alpha_bar, x)
        levels.append((alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps.to(x.dtype)).to(images.dtype))
    return levels


def loss_terms(
    preds: Sequence[Tensor],
    images: Tensor,
    alpha_bars: Tensor,
    strides: list[tuple[int, int]],
    noise: Sequence[Tensor],
    prediction: str,
    loss_target: str,
    weights: list[float],
) -> Tensor:
    """Give, per level and sample, weight · mean squared error in the loss target's space → (levels, B) in the working
    dtype; the loss is their sum over levels.

    preds[i] may hold the leading samples only; a sample without a prediction at a level gets nothing from it.
    """
    batch, terms = images.shape[0], []
    for pred, alpha_bar, stride, eps, weight in zip(preds, alpha_bars, strides, noise, weights, strict=True):
        rows = pred.shape[0]
        x = level_image(images[:rows], stride)
        alpha_bar = alpha_bar[:rows].to(x.dtype)
        c_x, c_n = target_coefficients(alpha_bar, prediction)
        target = _per_sample(c_x, x) * x + _per_sample(c_n, x) * eps[:rows].to(x.dtype)
        squared_error = (pred.to(x.dtype) - target).square().flatten(1)
        squared_error = squared_error.sum(1) / max(squared_error.shape[1], 1)
        term = weight * loss_factor(alpha_bar, prediction, loss_target) * squared_error
        terms.append(F.pad(term, (0, batch - rows)))
    return torch.stack(terms)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, …) in x's dtype."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def seeded_noise(images: Tensor, strides: list[tuple[int, int]], seed: int | Tensor) -> list[Tensor]:
    """Draw the noise that a seed (an int, or one int64 in a tensor) stands for, one tensor a level, in the working
    dtype."""
    noise = []
    for time, space in strides:
        frames = 1 if images.dim() == 4 else images.shape[2] // time
        height, width = (size // space for size in images.shape[-2:])
        shape = (images.shape[0], images.shape[1], frames, height, width)
        eps = philox_normal(shape, seed, (time, space), working_dtype(images), images.device)
        noise.append(eps.squeeze(2) if images.dim() == 4 else eps)
    return noise


def philox_normal(
    shape: tuple[int, int, int, int, int],
    seed: int | Tensor,
    stride: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw standard normal numbers (B, C, T, H, W) at places of a counter-based generator (Salmon et al. 2011).

    Element (b, c, t, h, w) of a level is output w mod 4 of Philox-4x32-10 under the key (seed mod 2³², ⌊seed / 2³²⌋) at
    the counter

        (⌊w / 4⌋,  (c·T + t)·H + h,  b,  65536·time + space)

    where (time, space) is the level's stride. It depends on neither the memory format, nor the batch size, nor which
    other levels there are. Outputs 0 and 1 make one Box–Muller pair (cosine, sine), 2 and 3 the other.
    """
    batch, channels, frames, height, width = shape
    groups = -(-width // 4)
    column = torch.arange(groups, device=device).view(1, 1, groups)
    row = torch.arange(channels * frames * height, device=device).view(1, -1, 1)
    sample = torch.arange(batch, device=device).view(-1, 1, 1)
    level = torch.full((1, 1, 1), level_word(stride), device=device)
    seed = seed.reshape(()) if isinstance(seed, Tensor) else seed
    bits = philox_4x32((column, row, sample, level), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    normal = torch.stack([*box_muller(bits[0], bits[1], dtype), *box_muller(bits[2], bits[3], dtype)], dim=-1)
    return normal.flatten(-2)[..., :width].reshape(shape)


def level_word(stride: tuple[int, int]) -> int:
    """Give the word of the Philox counter that tells levels apart."""
    return 65536 * stride[0] + stride[1]


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> tuple[Tensor, ...]:
    """Run ten rounds of Philox-4x32 on four words that broadcast together; words are int64 tensors below 2³²."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * 0xD2511F53  # int64 wraps at 2⁶⁴: the high word is right once its sign is masked off
        product1 = c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32).bitwise_and_(low) ^ (c1 ^ k0), product1 & low
        c2, c3 = (product0 >> 32).bitwise_and_(low) ^ (c3 ^ k1), product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def box_muller(bits0: Tensor, bits1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make two standard normal numbers from two 32-bit words, of which the upper 24 bits count: they are exact in
    float32, and radius 0 < u ≤ 1 keeps the logarithm finite (|normal| ≤ 5.77)."""
    radius = (((bits0 >> 8) + 1).to(dtype) * 2.0**-24).log_().mul_(-2).sqrt_()
    angle = (bits1 >> 8).to(dtype) * (2 * math.pi * 2.0**-24)
    return radius * angle.cos(), radius * angle.sin()
