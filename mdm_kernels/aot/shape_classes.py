"""The launches that `mdm_kernels.aot` compiles: for each op, calls on meta tensors that reach every one of its kernels.

Shapes are those of the models, one for each set of kernel constants and argument specialisations; batches are small,
because no kernel depends on their size beyond its divisibility by 16, but GroupNorm, which goes by tiles at large ones.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import tma
from ..group_norm import launch as group_norm_launch
from ..library import ops
from ..multires import reference


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make a tensor without memory, on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def group_norm_class(
    *shape: int, skip_channels=0, dtype=torch.bfloat16, channels_last=True, film=False, frames=1, silu=True
) -> None:
    """Run group_norm_silu forward and backward in 32 groups, with float32 weights."""
    rows, channels, *size = shape
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = meta(*shape, dtype=dtype).to(memory_format=memory_format)
    skip = None
    if skip_channels:
        skip = meta(rows, skip_channels, *size, dtype=dtype).to(memory_format=memory_format)
        channels += skip_channels
    weight, bias = meta(channels, dtype=torch.float32), meta(channels, dtype=torch.float32)
    scale, shift = meta(rows // frames, 2 * channels, dtype=dtype).chunk(2, 1) if film else (None, None)
    y, mean, rstd = ops.group_norm_silu_forward(x, skip, 32, weight, bias, scale, shift, 1e-5, silu)
    ops.group_norm_silu_backward(y, x, skip, mean, rstd, 32, weight, bias, scale, shift, silu)


def one_pass_class(*shape: int, **options) -> None:
    """Run `group_norm_class` with the groups that are too large for one program in one pass."""
    with group_norm_launch.one_pass():
        group_norm_class(*shape, **options)


def multires_class(
    *shape: int,
    strides: list[tuple[int, int]],
    seed: int | None = 1,
    device_seed: bool = False,
    dtype=torch.float32,
    pred_dtype=torch.bfloat16,
    channels_last=True,
) -> None:
    """Run multires_noise and multires_loss, forward and backward; with no seed of either kind, the noise is given."""
    images = meta(*shape, dtype=dtype)
    times, spaces = (list(part) for part in zip(*strides, strict=True))
    alpha_bars = meta(len(strides), shape[0], dtype=torch.float32)
    noise = [reference.level_image(images, stride).to(dtype) for stride in strides]
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    preds = [eps.to(pred_dtype, memory_format=last if channels_last else torch.contiguous_format) for eps in noise]
    seeded = seed is not None or device_seed
    source = ([] if seeded else noise, seed, meta(1, dtype=torch.int64) if device_seed else None)
    spaces_and_weights = ("v", "eps", [1.0] * len(strides))
    ops.multires_noise(images, alpha_bars, times, spaces, *source)
    loss, residuals = ops.multires_loss_forward(
        preds, images, alpha_bars, times, spaces, *source, *spaces_and_weights, True
    )
    ops.multires_loss_backward(residuals, loss, alpha_bars, *spaces_and_weights)


def self_cross_class(batch, tokens, context, heads, width, *, masked=True, dtype=torch.bfloat16, nchw=False) -> None:
    """Run self_cross_attention forward and backward; `nchw`: qkv as a 1×1 convolution writes it in that format."""
    channels = heads * width
    qkv = meta(batch, 3 * channels, tokens, dtype=dtype).mT if nchw else meta(batch, tokens, 3 * channels, dtype=dtype)
    context_kv = meta(batch, context, 2 * channels, dtype=dtype)
    key_mask = meta(batch, context, dtype=torch.bool) if masked else None
    out, lse = ops.self_cross_attention_forward(qkv, context_kv, key_mask, heads)
    ops.self_cross_attention_backward(out, qkv, context_kv, key_mask, out, lse, heads)


def flash_class(batch, tokens, heads, width, *, masked=False, dtype=torch.bfloat16) -> None:
    """Run flash_attention forward and backward on projections (B, L, H, D)."""
    q = meta(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    key_mask = meta(batch, tokens, dtype=torch.bool) if masked else None
    out, lse = ops.flash_attention_forward(q, q, q, key_mask, width**-0.5)
    ops.flash_attention_backward(out, q, q, q, key_mask, out, lse, width**-0.5)


def by_tma(call: Callable[..., None], *sizes: int, **options) -> None:
    """Run `self_cross_class` or `flash_class` with tiles read by TMA."""
    with tma.by_tma():
        call(*sizes, **options)


def temporal_class(frames, positions, heads, width, *, rotary=False, dtype=torch.bfloat16) -> None:
    """Run temporal_attention forward and backward on one clip."""
    qkv = meta(frames, positions, 3 * heads * width, dtype=dtype)
    angles = meta(frames, width // 2, dtype=torch.float32) if rotary else None
    out = ops.temporal_attention_forward(qkv, angles, angles, heads, frames)
    ops.temporal_attention_backward(out, qkv, angles, angles, heads, frames)


SHAPE_CLASSES: dict[str, Callable[[], None]] = {
    "group_norm 1×256×64² FiLM": functools.partial(group_norm_class, 1, 256, 64, 64, film=True),
    "group_norm 768×16²": functools.partial(group_norm_class, 2, 768, 16, 16, silu=False),
    "group_norm 512×32² FiLM": functools.partial(group_norm_class, 64, 512, 32, 32, film=True),
    "group_norm 16×768×32²": functools.partial(group_norm_class, 16, 768, 32, 32, silu=False),
    "group_norm 16×256×64² FiLM": functools.partial(group_norm_class, 16, 256, 64, 64, film=True),
    "group_norm 64×256² FiLM": functools.partial(group_norm_class, 2, 64, 256, 256, film=True),
    "group_norm 512×32² fp32 NCHW": functools.partial(
        group_norm_class, 2, 512, 32, 32, dtype=torch.float32, channels_last=False
    ),
    "group_norm 128×128² fp16, 16 frames": functools.partial(
        group_norm_class, 16, 128, 128, 128, dtype=torch.float16, film=True, frames=16
    ),
    "group_norm of a skip, 768 + 512, 16²": functools.partial(group_norm_class, 2, 768, 16, 16, skip_channels=512),
    "group_norm of a skip, 768 + 512, 32²": functools.partial(group_norm_class, 1, 768, 32, 32, skip_channels=512),
    "group_norm of a skip, 256 + 128, 128²": functools.partial(group_norm_class, 2, 256, 128, 128, skip_channels=128),
    "group_norm of a skip, 512 + 256, 64² FiLM fp32 NCHW": functools.partial(
        group_norm_class, 2, 512, 64, 64, skip_channels=256, dtype=torch.float32, channels_last=False, film=True
    ),
    "group_norm 64×256² FiLM, one pass": functools.partial(one_pass_class, 2, 64, 256, 256, film=True),
    "group_norm of a skip, 256 + 128, 128², one pass": functools.partial(
        one_pass_class, 2, 256, 128, 128, skip_channels=128
    ),
    "group_norm of a skip, 512 + 256, 64² FiLM fp32 NCHW, one pass": functools.partial(
        one_pass_class, 2, 512, 64, 64, skip_channels=256, dtype=torch.float32, channels_last=False, film=True
    ),
    "multires 256² + 64²": functools.partial(multires_class, 2, 3, 256, 256, strides=[(1, 1), (1, 4)]),
    "multires 256² + 64², seed in memory": functools.partial(
        multires_class, 2, 3, 256, 256, strides=[(1, 1), (1, 4)], seed=None, device_seed=True
    ),
    "multires 64² of 4 channels": functools.partial(multires_class, 2, 4, 64, 64, strides=[(1, 1)]),
    "multires 1024² + 256² + 64²": functools.partial(
        multires_class, 2, 3, 1024, 1024, strides=[(1, 1), (1, 4), (1, 16)], dtype=torch.bfloat16
    ),
    "multires 16×256² + 16×64² + 1×64²": functools.partial(
        multires_class, 2, 3, 16, 256, 256, strides=[(1, 1), (1, 4), (16, 4)], channels_last=False
    ),
    "multires 256² + 64² fp32, noise given": functools.partial(
        multires_class,
        *(2, 3, 256, 256),
        strides=[(1, 1), (1, 4)],
        seed=None,
        pred_dtype=torch.float32,
        channels_last=False,
    ),
    "self_cross 8×64, 1024 + 128": functools.partial(self_cross_class, 16, 1024, 128, 8, 64),
    "self_cross 8×96, 256 + 128": functools.partial(self_cross_class, 16, 256, 128, 8, 96),
    "self_cross 8×64, 1024 + 128, batch 2, no mask": functools.partial(
        self_cross_class, 2, 1024, 128, 8, 64, masked=False
    ),
    "self_cross 8×96, 256 + 128, batch 2, no mask": functools.partial(
        self_cross_class, 2, 256, 128, 8, 96, masked=False
    ),
    "self_cross 8×96, 1000 + 77 fp16 NCHW": functools.partial(
        self_cross_class, 16, 1000, 77, 8, 96, dtype=torch.float16, nchw=True
    ),
    "self_cross 8×64, 1024 + 128 fp32": functools.partial(self_cross_class, 2, 1024, 128, 8, 64, dtype=torch.float32),
    "flash 8×64, 1024": functools.partial(flash_class, 16, 1024, 8, 64),
    "flash 8×96, 256": functools.partial(flash_class, 16, 256, 8, 96),
    "flash 8×128, 77": functools.partial(flash_class, 2, 77, 8, 128, masked=True),
    "flash 8×96, 256 fp32": functools.partial(flash_class, 2, 256, 8, 96, dtype=torch.float32),
    "self_cross 8×64, 1024 + 128, by TMA": functools.partial(by_tma, self_cross_class, 16, 1024, 128, 8, 64),
    "self_cross 8×96, 256 + 128, by TMA": functools.partial(by_tma, self_cross_class, 16, 256, 128, 8, 96),
    "flash 8×64, 1024, by TMA": functools.partial(by_tma, flash_class, 16, 1024, 8, 64),
    "flash 8×128, 77, by TMA": functools.partial(by_tma, flash_class, 2, 77, 8, 128, masked=True),
    "temporal 8×32, 16 frames": functools.partial(temporal_class, 16, 1024, 8, 32),
    "temporal 8×32, 16 frames, rotary": functools.partial(temporal_class, 16, 1024, 8, 32, rotary=True),
    "temporal 8×96, 5 frames, rotary": functools.partial(temporal_class, 5, 1024, 8, 96, rotary=True),
    "temporal 8×64, 32 frames, rotary": functools.partial(temporal_class, 32, 1024, 8, 64, rotary=True),
    "temporal 8×64, 32 frames, rotary fp32": functools.partial(
        temporal_class, 32, 1024, 8, 64, rotary=True, dtype=torch.float32
    ),
    "temporal 8×32, 16 frames, rotary fp32": functools.partial(
        temporal_class, 16, 1024, 8, 32, rotary=True, dtype=torch.float32
    ),
}
