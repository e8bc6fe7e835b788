"""The ops of `mdm_kernels` as they are commonly written in plain PyTorch: what the benchmarks compare against.

These are no oracles (`mdm_kernels/*/reference.py` are): each is the straightforward sequence of library calls.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_kernels import GroupNormSiLU
from mdm_models import layers
from mdm_models.diffusion import objective


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, skip=None, scale=None, shift=None, activation="silu"
):
    """Compute `mdm_kernels.group_norm_silu` by concatenation, group norm, FiLM and SiLU, one after the other."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        frames = x.shape[0] // scale.shape[0]
        gain, offset = (film.repeat_interleave(frames, dim=0)[:, :, None, None] for film in (scale, shift))
        y = y * (1 + gain) + offset
    return F.silu(y) if activation == "silu" else y


def flash_attention(q, k, v, *, key_mask=None, scale=None):
    """Compute `mdm_kernels.flash_attention` by PyTorch's scaled_dot_product_attention."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def self_cross_attention(qkv, context_kv=None, *, num_heads, key_mask=None):
    """Compute `mdm_kernels.self_cross_attention` by two calls of scaled_dot_product_attention and a sum."""
    q, k, v = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    h = F.scaled_dot_product_attention(q, k, v)
    if context_kv is not None:
        k, v = (part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in context_kv.chunk(2, dim=2))
        h = h + flash_attention(q, k, v, key_mask=key_mask)
    return h.transpose(1, 2).flatten(2)


def temporal_attention(qkv, *, num_heads, frames, rotary=None):
    """Compute `mdm_kernels.temporal_attention` by scaled_dot_product_attention. Raises NotImplementedError for
    `rotary`."""
    if rotary is not None:
        raise NotImplementedError("the plain version is for models without rotary positions")
    clips = qkv.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, L, T, 3C)
    q, k, v = (part.unflatten(3, (num_heads, -1)).transpose(2, 3) for part in clips.chunk(3, dim=3))
    if qkv.is_cuda:  # the fused kernels there take four dimensions; on a CPU, products in five are faster
        h = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])
    else:
        h = F.scaled_dot_product_attention(q, k, v)  # (B, L, heads, T, D)
    return h.transpose(2, 3).flatten(3).transpose(1, 2).flatten(0, 1)


def _level_images(images: Tensor, strides) -> list[Tensor]:
    levels = []
    for stride in strides:
        time, space = stride if isinstance(stride, tuple) else (1, stride)
        level = images if images.dim() == 4 else images[:, :, ::time]
        pool = F.avg_pool2d if images.dim() == 4 else lambda x, s: F.avg_pool3d(x, (1, s, s))
        levels.append(pool(level, space) if space > 1 else level)
    return levels


def _beside(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def multires_noise(images, alpha_bars, strides, noise, *, seed=None):
    """Compute `mdm_kernels.multires_noise` from noise of each level that was drawn before; `seed` is not used."""
    levels = _level_images(images, strides)
    return [
        _beside(a, x).sqrt() * x + (1 - _beside(a, x)).sqrt() * e
        for a, x, e in zip(alpha_bars, levels, noise, strict=True)
    ]


def multires_loss(
    preds,
    images,
    alpha_bars,
    strides,
    noise,
    *,
    seed=None,
    prediction="v",
    loss_target="eps",
    weights=None,
    rows=None,
    per_level=False,
):
    """Compute `mdm_kernels.multires_loss` from noise of each level that was drawn before, without `seed` and `rows`.

    Raises NotImplementedError unless the prediction is v and the loss in ε.
    """
    if (prediction, loss_target) != ("v", "eps"):
        raise NotImplementedError("the plain version is for v-prediction with the loss in ε")
    levels = _level_images(images, strides)
    losses = []
    for i, (pred, a, x, e) in enumerate(zip(preds, alpha_bars, levels, noise, strict=True)):
        a = _beside(a, x)
        v = a.sqrt() * e - (1 - a).sqrt() * x
        error = (a * (pred.float() - v).square()).flatten(1).mean(1)
        losses.append((weights[i] if weights else 1.0) * error)
    return torch.stack(losses) if per_level else sum(losses)


def sampler_step(x, preds, alpha_bar_t, alpha_bar_s, guidance_scale=5.0):
    """Compute x_s of one level in float32 by the DDPM posterior (Ho et al. 2020, equation 7) from x_t (B, …),
    v-predictions (2B, …), the unconditional ones first, and ᾱ of t and s (B,)."""
    unconditional, conditional = preds.float().chunk(2)
    v = unconditional + guidance_scale * (conditional - unconditional)
    a_t, a_s = _beside(alpha_bar_t, x), _beside(alpha_bar_s, x)
    x_0 = (a_t.sqrt() * x - (1 - a_t).sqrt() * v).clamp(-1, 1)
    beta = 1 - a_t / a_s
    mean = x_0 * (beta * a_s.sqrt() / (1 - a_t)) + x * ((a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t))
    return mean + (beta * (1 - a_s) / (1 - a_t)).sqrt() * torch.randn_like(x)


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Inside the block the models and the objective of `mdm_models` run on the plain ops of this module."""

    def forward(self, x, scale=None, shift=None, skip=None):
        options = {"skip": skip, "scale": scale, "shift": shift, "activation": self.activation}
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, **options)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(GroupNormSiLU, "forward", forward))
        for op in (flash_attention, self_cross_attention, temporal_attention):
            patches.enter_context(mock.patch.object(layers, op.__name__, op))
        for op in (multires_noise, multires_loss):
            patches.enter_context(mock.patch.object(objective, op.__name__, op))
        yield
