"""The blocks of the UNets.

Inside a model every feature map is (rows, channels, height, width) in channels_last memory, with one row an image or
one row a frame: the frames of a clip are consecutive rows. Attention reads the same memory as tokens
(rows, height·width, channels), so that no layer copies to change layout.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mdm_kernels import GroupNormSiLU, flash_attention, self_cross_attention, temporal_attention

Layer = TypeVar("Layer", bound=nn.Module)


def module_list(modules: Iterable[Layer]) -> Sequence[Layer]:
    """Make an nn.ModuleList, typed by what is in it, as torch's is not."""
    return cast(Sequence[Layer], nn.ModuleList(modules))


def zero_init(layer: Layer) -> Layer:
    """Start a layer at zero, so that the branch that ends in it adds nothing at first."""
    vars(layer)["starts_at_zero"] = True  # for `materialise`, where the layer was made without memory
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def materialise(model: Layer, device: torch.device) -> Layer:
    """Give a model that was made on the meta device its memory, in its memory format, and torch's usual first values.

    One number drawn from torch's generator decides them all: each layer draws from a generator of its own, so that
    several threads can fill a large model at once. Layers that start at zero draw nothing. Raises TypeError for a layer
    with parameters that is of no type known here.
    """
    modules = list(model.modules())
    seed = int(torch.randint(2**48, (), device="cpu").item())
    with ThreadPoolExecutor() as pool:
        list(pool.map(_fill, modules, repeat(device), range(seed, seed + len(modules))))
    return model.to(device)  # the buffers


@torch.no_grad()
def _fill(module: nn.Module, device: torch.device, seed: int) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    if getattr(module, "starts_at_zero", False):
        zero_init(module)
    elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        generator = torch.Generator(device).manual_seed(seed)
        bound = module.weight[0].numel() ** -0.5  # weights and biases alike: 1 / √(inputs of one output)
        for parameter in module.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
        module.reset_parameters()  # ones and zeros
    elif next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"the first values of a {type(module).__name__}'s parameters are not known to `materialise`")


def tokens_of(x: Tensor) -> Tensor:
    """View a map as tokens: (B, C, H, W) → (B, H·W, C), without a copy in channels_last memory."""
    return x.flatten(2).transpose(1, 2)


def image_of(tokens: Tensor, like: Tensor) -> Tensor:
    """View tokens as a map: (B, H·W, C) → (B, C, H, W) with the height and width of `like`, in channels_last memory."""
    return torch.unflatten(tokens.transpose(1, 2), 2, like.shape[2:])


class SinusoidalEmbedding(nn.Module):
    """A number → its sinusoid → Linear, SiLU, Linear.  (B,) → (B, embed_dim).

    The frequencies are made anew each time: as a buffer they would be rounded when the model is cast, and bfloat16
    turns the angle at t = 999 by up to two radians.
    """

    def __init__(self, embed_dim: int, zero: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim // 4, embed_dim)
        self.fc2 = nn.Linear(embed_dim, embed_dim)
        if zero:
            zero_init(self.fc2)

    def forward(self, value: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(sinusoid(value, self.fc1.in_features).to(self.fc1.weight.dtype))))


def sinusoid(value: Tensor, width: int) -> Tensor:
    """Give sines, then cosines, of the value times width/2 frequencies from 1 to near 1/10000: (B,) → (B, width)
    float32."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=value.device)
    angles = value.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Shortcut(nn.Conv2d):
    """The 1×1 convolution beside a residual block that changes the width.

    x (B·T, C, H, W) and, on the way up, skip (B·T, C', H, W) with C + C' = in → (B·T, out, H, W). Each is multiplied by
    its part of the weight, so that nothing is concatenated.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if skip is None:
            return super().forward(x)
        of_x, of_skip = self.weight.split([x.shape[1], skip.shape[1]], dim=1)
        return F.conv2d(x, of_x, self.bias) + F.conv2d(skip, of_skip)


class ResidualBlock(nn.Module):
    """GroupNorm·SiLU → conv → GroupNorm·FiLM·SiLU → dropout → conv, beside a shortcut.

    x (B·T, C, H, W) and, on the way up, skip (B·T, C', H, W) with C + C' = in; embedding (B, embed_dim) already through
    SiLU → (B·T, out, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int, norm_groups: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(embed_dim, 2 * out_channels)
        self.norm2 = GroupNormSiLU(norm_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = Shortcut(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        scale, shift = self.film(embedding).chunk(2, dim=1)
        h = self.conv1(self.norm1(x, skip=skip))
        h = self.dropout(self.norm2(h, scale, shift))
        return (x if self.skip is None else self.skip(x, skip)) + self.conv2(h)


class AttentionBlock(nn.Module):
    """Self-attention plus, with the same queries, attention to the text; then an optional feed-forward layer.

    x (B, C, H, W), context (B, S, context_dim), context_mask (B, S) bool → (B, C, H, W). keys_values: what
    `prepare` made of the context, where that is known already.
    """

    def __init__(self, channels: int, num_heads: int, norm_groups: int, context_dim: int, ffn: bool):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(norm_groups, channels, activation=None)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_norm = nn.LayerNorm(context_dim) if context_dim else None
        self.context_kv = nn.Linear(context_dim, 2 * channels) if context_dim else None
        self.proj = zero_init(nn.Linear(channels, channels))
        self.ffn_norm = GroupNormSiLU(norm_groups, channels, activation=None) if ffn else None
        self.ffn = FeedForward(channels) if ffn else None

    def prepare(self, context: Tensor | None) -> Tensor | None:
        """Make the keys and values (B, S, 2C) of a text (B, S, context_dim), which are the same at every step of
        sampling; None where the layer sees no text."""
        return self._keys_values(context)  # FSDP hides the weights again after `prepare`: forward must not call it

    def _keys_values(self, context: Tensor | None) -> Tensor | None:
        if self.context_kv is None or self.context_norm is None:
            return None
        return self.context_kv(self.context_norm(context))

    def forward(
        self, x: Tensor, context: Tensor | None, context_mask: Tensor | None, keys_values: Tensor | None = None
    ) -> Tensor:
        qkv = self.qkv(tokens_of(self.norm(x)))
        keys_values = self._keys_values(context) if keys_values is None else keys_values
        mask = context_mask if keys_values is not None else None
        h = self_cross_attention(qkv, keys_values, num_heads=self.num_heads, key_mask=mask)
        x = x + image_of(self.proj(h), like=x)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + image_of(self.ffn(tokens_of(self.ffn_norm(x))), like=x)
        return x


class FeedForward(nn.Module):
    """Linear ×4 → GELU → Linear.  (..., C) → (..., C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = zero_init(nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TemporalAttentionBlock(nn.Module):
    """Attention over the frames of a clip at every position of a map at half resolution, added to the input.

    x (B·T, C, H, W) → (B·T, C, H, W); H and W even.
    """

    def __init__(self, channels: int, head_dim: int, rotary: bool):
        super().__init__()
        self.num_heads = channels // head_dim
        self.head_dim = head_dim
        self.rotary = rotary
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels)
        self.up = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        low = self.down(x)
        h = tokens_of(low)
        rotary = rotary_angles(frames, self.head_dim, x.device) if self.rotary else None
        h = h + self.proj(
            temporal_attention(self.qkv(self.norm(h)), num_heads=self.num_heads, frames=frames, rotary=rotary)
        )
        h = h + self.mlp(self.mlp_norm(h))
        return x + self.up(F.interpolate(image_of(h, like=low), scale_factor=2))


def rotary_angles(frames: int, head_dim: int, device: torch.device) -> Tensor:
    """Give the rotation of each frame's channel pairs, in radians: (frames, head_dim / 2), base 10000 (Su et al.,
    RoFormer)."""
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return torch.arange(frames, device=device, dtype=torch.float32)[:, None] * inverse


class TimeConv(nn.Conv1d):
    """A convolution over the frames of clips at every pixel.  (B·T, C, H, W) → (B·T/stride, out, H, W).

    In channels_last memory a clip is also one picture with a row of H·W pixels for each frame: a two-dimensional
    convolution with a kernel one pixel wide runs over it without transposing anything.
    """

    def forward(self, x: Tensor, frames: int, repeat: int = 1) -> Tensor:
        """`repeat`: convolve the clips with every frame repeated so many times."""
        picture = rearrange(x, "(b t) c h w -> b t (h w) c", t=frames).permute(0, 3, 1, 2)
        if repeat > 1:
            picture = F.interpolate(picture, scale_factor=(repeat, 1))
        padding = (int(self.padding[0]), 0)
        picture = F.conv2d(picture, self.weight[..., None], self.bias, stride=(*self.stride, 1), padding=padding)
        return rearrange(picture, "b c t (h w) -> (b t) h w c", h=x.shape[2]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve the height and width of every row, or (kind "time") the number of frames of every clip.

    x (B·T, C, H, W) → (B·T, C, H/2, W/2) or (B·T/2, C, H, W).
    """

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.over_time = kind == "time"
        self.conv = (TimeConv if self.over_time else nn.Conv2d)(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return self.conv(x, frames) if self.over_time else self.conv(x)


class Upsample(nn.Module):
    """Double the height and width of every row, or (kind "time") the number of frames of every clip: nearest neighbour,
    then a convolution.

    x (B·T, C, H, W) → (B·T, C, 2H, 2W) or (2·B·T, C, H, W).
    """

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.over_time = kind == "time"
        self.conv = (TimeConv if self.over_time else nn.Conv2d)(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return self.conv(x, frames, repeat=2) if self.over_time else self.conv(F.interpolate(x, scale_factor=2))


class TextSelfAttention(nn.Module):
    """One pre-norm transformer layer over the text features.  (B, S, D), mask (B, S) → (B, S, D)."""

    def __init__(self, width: int, num_heads: int = 8):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zero_init(nn.Linear(width, width))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b s (part heads d) -> part b heads s d", part=3, heads=self.num_heads)
        h = flash_attention(q, k, v, key_mask=mask)
        x = x + self.proj(rearrange(h, "b heads s d -> b s (heads d)"))
        return x + self.mlp(self.mlp_norm(x))


class TextConditioning(nn.Module):
    """Text features → what attention layers see, and one pooled vector to add to the time embedding.

    context (B, S, context_dim), mask (B, S) bool or None → context (B, S, width), mask or None, pooled (B, embed_dim).
    A row whose mask is all False pools to zero.
    """

    def __init__(self, context_dim: int, proj_dim: int, layers: int, masked: bool, embed_dim: int):
        super().__init__()
        width = proj_dim or context_dim
        self.masked = masked
        self.proj = nn.Linear(context_dim, proj_dim) if proj_dim else nn.Identity()
        self.layers = module_list(TextSelfAttention(width) for _ in range(layers))
        self.pool = nn.Linear(width, embed_dim, bias=False)

    def forward(self, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        context = self.proj(context)
        for layer in self.layers:
            context = layer(context, mask if self.masked else None)
        if mask is None or (self.layers and not self.masked):
            pooled = context.mean(dim=1)
        else:
            wide = torch.promote_types(context.dtype, torch.float32)  # bfloat16 cannot count beyond 256
            total = (mask[..., None] * context).sum(dim=1, dtype=wide)
            pooled = (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(context.dtype)
        return context, mask if self.masked else None, self.pool(pooled)
