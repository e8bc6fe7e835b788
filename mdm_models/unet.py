"""The UNet, and the UNet with another one nested in place of its middle.

Outside, an image is (B, C, H, W) and a clip (B, C, T, H, W); inside, `layers` sees (B·T, C, H, W). A model takes and
returns one tensor a level, highest resolution first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mdm_kernels import GroupNormSiLU
from mdm_models.config import UNetConfig
from mdm_models.inputs import check_condition, check_inputs
from mdm_models.layers import (
    AttentionBlock,
    Downsample,
    Layer,
    ResidualBlock,
    SinusoidalEmbedding,
    TemporalAttentionBlock,
    TextConditioning,
    Upsample,
    materialise,
    module_list,
    zero_init,
)
from mdm_models.storage import write_model


@dataclass(frozen=True)
class PreparedCondition:
    """What a model has made of the condition, which every level is told besides its noisy input and the time; all with
    one row a sample."""

    micro: dict[str, Tensor]  # name → (B,)
    context: Tensor | None = None  # (B, S, width)
    context_mask: Tensor | None = None  # (B, S) bool
    pooled: Tensor | None = None  # (B, embed_dim)
    keys_values: dict[nn.Module, Tensor] = field(default_factory=dict)  # of attention, (B, S, 2C), where known already

    @property
    def rows(self) -> int | None:
        """The number of samples that the condition is for; None where nothing says so."""
        return next(map(len, self.tensors().values()), None)

    def tensors(self) -> dict[object, Tensor]:
        """Give all tensors that there are, by what they are."""
        text = {"context": self.context, "context_mask": self.context_mask, "pooled": self.pooled}
        found: dict[object, Tensor] = {name: x for name, x in text.items() if x is not None}
        found.update({f"micro {name}": value for name, value in self.micro.items()})
        found.update(self.keys_values.items())
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> "PreparedCondition":
        """Make the same condition with every tensor changed."""
        micro = {name: change(x) for name, x in self.micro.items()}
        keys_values = {block: change(x) for block, x in self.keys_values.items()}
        text = (self.context, self.context_mask, self.pooled)
        context, mask, pooled = (None if x is None else change(x) for x in text)
        return PreparedCondition(micro, context, mask, pooled, keys_values)


class ResolutionBlocks(nn.Module):
    """The residual and attention blocks at one resolution, and the change of resolution after them.

    `in_channels` has one entry a residual block: on the way up each block also reads a skip.
    """

    def __init__(self, config: UNetConfig, index: int, in_channels: list[int], context_dim: int, resample: str | None):
        super().__init__()
        width = config.channels[index]
        self.attention_layers = config.attention[index] if config.attention else 0
        self.temporal_layers = config.temporal_attention[index] if config.temporal_attention else 0
        blocks = len(in_channels)
        self.resnets = module_list(
            ResidualBlock(channels, width, config.embed_dim, config.norm_groups, config.dropout)
            for channels in in_channels
        )
        self.attention = module_list(
            AttentionBlock(width, config.num_heads, config.norm_groups, context_dim, config.attention_ffn)
            for _ in range(blocks * self.attention_layers)
        )
        self.temporal = module_list(
            TemporalAttentionBlock(width, config.temporal_head_dim, config.rotary)
            for _ in range(blocks * self.temporal_layers)
        )
        resamplers = {"down": Downsample, "up": Upsample}
        self.resample = resamplers[resample](width, config.kind) if resample else None

    def block(
        self, index: int, x: Tensor, embedding: Tensor, condition: PreparedCondition, skip: Tensor | None = None
    ) -> Tensor:
        """Run residual block `index`, of x and, on the way up, a skip, and the attention layers after it.

        x (B·T, C, H, W), skip (B·T, in − C, H, W) → (B·T, width, H, W).
        """
        x = self.resnets[index](x, embedding, skip)
        for layer in self._after(self.attention, self.attention_layers, index):
            x = layer(x, condition.context, condition.context_mask, condition.keys_values.get(layer))
        for layer in self._after(self.temporal, self.temporal_layers, index):
            x = layer(x, frames=x.shape[0] // embedding.shape[0])
        return x

    @staticmethod
    def _after(layers: Sequence[Layer], count: int, index: int) -> Sequence[Layer]:
        return layers[index * count : (index + 1) * count]


class UNet(nn.Module):
    """An ordinary UNet: time, text and micro-conditions in, a prediction of the input's shape out.

    Args of forward:
        x: list with one noisy tensor a level, highest resolution first: (B, C, H, W), or (B, C, T, H, W) for a clip.
            In a mixed batch an outer level may hold only the first rows of the level inside it.
        time: (B,) the integer time 0…num_steps−1, as integers or floats.
        context: (B, S, context_dim) text features, needed if the model has a `context_dim`; or, in place of it and all
            that follows, what `prepare` made of them.
        context_mask: (B, S) bool, True at real tokens; None: all are real.
        micro: micro-conditions by name, each (B,); a missing one takes its default.

    Returns a list of tensors of the shapes of `x`. Raises ValueError if an input does not fit the model, TypeError if
    `time` or a micro-condition is in half precision, which would round it.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.time_embed = SinusoidalEmbedding(config.embed_dim)
        self.micro_embed = nn.ModuleDict(
            {name: SinusoidalEmbedding(config.embed_dim, zero=True) for name, _ in config.micro}
        )
        self.conv_in = nn.Conv2d(config.image_channels, config.channels[0], 3, padding=1)
        self._build_resolutions(config)
        self.norm_out = GroupNormSiLU(config.norm_groups, config.channels[0])
        self.conv_out = zero_init(nn.Conv2d(config.channels[0], config.image_channels, 3, padding=1))
        self._build_middle(config)

    def _build_resolutions(self, config: UNetConfig) -> None:
        context_dim = config.context_width
        last = len(config.channels) - 1
        skips = [width := config.channels[0]]
        down, up = [], []
        for i, channels in enumerate(config.channels):
            in_channels = [width] + [channels] * (config.blocks[i] - 1)
            down.append(ResolutionBlocks(config, i, in_channels, context_dim, "down" if i < last else None))
            skips += [channels] * (config.blocks[i] + (i < last))
            width = channels
        for i in reversed(range(last + 1)):
            channels = config.channels[i]
            in_channels = [(width if j == 0 else channels) + skips.pop() for j in range(config.blocks[i] + 1)]
            up.append(ResolutionBlocks(config, i, in_channels, context_dim, "up" if i else None))
            width = channels
        self.down, self.up = module_list(down), module_list(up)

    def _build_middle(self, config: UNetConfig) -> None:
        self.text = None
        if config.context_dim:
            self.text = TextConditioning(
                config.context_dim,
                config.context_proj_dim,
                config.context_layers,
                config.masked_context,
                config.embed_dim,
            )
        self.middle_blocks = nn.ModuleList()
        if config.mid_blocks:
            width, groups = config.channels[-1], config.norm_groups
            self.middle_blocks.extend(
                [
                    ResidualBlock(width, width, config.embed_dim, groups, config.dropout),
                    AttentionBlock(width, config.num_heads, groups, config.context_width, config.attention_ffn),
                    ResidualBlock(width, width, config.embed_dim, groups, config.dropout),
                ]
            )

    @property
    def innermost(self) -> "UNet":
        """The UNet that holds the text layers: the one at the lowest resolution."""
        return self

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write config.json and model.safetensors, for `mdm_models.from_pretrained`. See `storage.write_model`."""
        write_model(directory, self.config, self.state_dict(), overwrite)

    def forward(
        self,
        x: list[Tensor],
        time: Tensor,
        context: Tensor | PreparedCondition | None = None,
        context_mask: Tensor | None = None,
        micro: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        check_inputs(self.config, x, time)
        if isinstance(context, PreparedCondition):
            condition = context
            if condition.rows not in (None, len(time)):
                raise ValueError(f"context was prepared for {condition.rows} samples; x has {len(time)}")
        else:
            check_condition(self.config, len(time), context, context_mask, micro or {})
            condition = self._condition(context, context_mask, micro)
        x = [level.to(self.conv_in.weight.dtype) for level in x]
        predictions, _ = self.denoise(x, None, time, condition)
        return predictions

    def prepare(
        self, context: Tensor | None, context_mask: Tensor | None = None, micro: dict[str, Tensor] | None = None
    ) -> PreparedCondition:
        """Compute all that the model makes of the condition alone, whatever x and the time: once for all steps of
        sampling. model(x, time, model.prepare(context, …)) is model(x, time, context, …), to the last bit.

        It holds keys and values of the text for every attention layer: B · S · 2 · channels numbers each.
        """
        rows = PreparedCondition(micro or {}, context).rows or 0
        check_condition(self.config, rows, context, context_mask, micro or {})
        condition = self._condition(context, context_mask, micro)
        blocks = [module for module in self.modules() if isinstance(module, AttentionBlock)]
        made = {block: block.prepare(condition.context) for block in blocks}
        keys_values = {block: value for block, value in made.items() if value is not None}
        return dataclasses.replace(condition, keys_values=keys_values)

    def _condition(
        self, context: Tensor | None, context_mask: Tensor | None, micro: dict[str, Tensor] | None
    ) -> PreparedCondition:
        text = self.innermost.text
        if text is None or context is None:
            return PreparedCondition(micro or {})
        mask = None if context_mask is None else context_mask.bool()
        return PreparedCondition(micro or {}, *text(context.to(self.conv_in.weight.dtype), mask))

    def denoise(
        self, x: list[Tensor], outer: Tensor | None, time: Tensor, condition: PreparedCondition
    ) -> tuple[list[Tensor], Tensor]:
        """Run this level and all inside it.

        x: this level's and the inner levels' inputs; outer: (B·T, channels[0], H, W) features of the UNet around this
        one, or None. Returns the predictions and this level's last features (B·T, channels[0], H, W).
        """
        is_clip = x[0].dim() == 5
        rows = x[0].shape[0]
        own = condition if rows == len(time) else condition.map(lambda tensor: tensor[:rows])
        embedding = F.silu(self._embed(time[:rows], own))
        h = rearrange(x[0], "b c t h w -> (b t) c h w") if is_clip else x[0]
        if self.config.normalize_input:
            wide = h.to(torch.promote_types(h.dtype, torch.float32))  # bfloat16 would round the deviation by 0.2 %
            h = (wide / wide.std((1, 2, 3), keepdim=True)).to(h.dtype)
        h = self.conv_in(h)
        if outer is not None:
            h = h + outer

        skips = [h]
        for resolution in self.down:
            for i in range(len(resolution.resnets)):
                h = resolution.block(i, h, embedding, own)
                skips.append(h)
            if resolution.resample is not None:
                h = resolution.resample(h, h.shape[0] // rows)
                skips.append(h)
        h, inner_predictions = self.middle(h, embedding, x[1:], time, condition)
        for resolution in self.up:
            for i in range(len(resolution.resnets)):
                h = resolution.block(i, h, embedding, own, skip=skips.pop())
            if resolution.resample is not None:
                h = resolution.resample(h, h.shape[0] // rows)

        prediction = self.conv_out(self.norm_out(h))
        if is_clip:
            prediction = rearrange(prediction, "(b t) c h w -> b c t h w", b=rows)
        return [prediction, *inner_predictions], h

    def middle(
        self, h: Tensor, embedding: Tensor, inner: list[Tensor], time: Tensor, condition: PreparedCondition
    ) -> tuple[Tensor, list[Tensor]]:
        """Run what stands between the way down and the way up: h (B·T, channels[-1], H, W) → the same shape, and the
        predictions of the levels inside."""
        if self.middle_blocks:
            first, attention, second = self.middle_blocks
            h = first(h, embedding)
            h = attention(h, condition.context, condition.context_mask, condition.keys_values.get(attention))
            h = second(h, embedding)
        return h, []

    def _embed(self, time: Tensor, condition: PreparedCondition) -> Tensor:
        """Time, pooled text and micro-conditions as one vector a sample.  → (B, embed_dim)."""
        embedding = self.time_embed(time)
        if condition.pooled is not None:
            embedding = embedding + condition.pooled
        for name, default in self.config.micro:
            value = condition.micro.get(name)
            value = torch.full_like(time, default, dtype=torch.float32) if value is None else value.float()
            value = value.clamp(max=default) if name == "scale" else value * 1000
            embedding = embedding + self.micro_embed[name](value)
        return embedding


class NestedUNet(UNet):
    """A UNet with another UNet, nested or not, in place of its middle blocks; it is called as `UNet` says."""

    def _build_middle(self, config: UNetConfig) -> None:
        assert config.inner is not None  # as `_unet` has seen
        self.inner = _unet(config.inner)
        width, inner_width = config.channels[-1], config.inner.channels[0]
        self.in_adapter = zero_init(nn.Conv2d(width, inner_width, 3, padding=1)) if config.in_adapter else None
        self.out_adapter = zero_init(nn.Conv2d(inner_width, width, 3, padding=1))

    @property
    def innermost(self) -> UNet:
        return self.inner.innermost

    def middle(
        self, h: Tensor, embedding: Tensor, inner: list[Tensor], time: Tensor, condition: PreparedCondition
    ) -> tuple[Tensor, list[Tensor]]:
        frames = h.shape[0] // embedding.shape[0]
        features = None
        if self.in_adapter is not None:
            features = self._adapt(self.in_adapter, h, frames)
            missing = frames * inner[0].shape[0] - features.shape[0]  # samples that this level of a mixed batch lacks
            if missing:
                features = torch.cat([features, features.new_zeros(missing, *features.shape[1:])])
        predictions, features = self.inner.denoise(inner, features, time, condition)
        return h + self._adapt(self.out_adapter, features[: h.shape[0]], frames), predictions

    def _adapt(self, adapter: nn.Conv2d, x: Tensor, frames: int) -> Tensor:
        if frames == 1 or not self.config.adapters_see_grid:
            return adapter(x)
        side = math.isqrt(frames)
        grid = rearrange(x, "(b rows columns) c h w -> b c (rows h) (columns w)", rows=side, columns=side)
        grid = adapter(grid)
        return rearrange(grid, "b c (rows h) (columns w) -> (b rows columns) c h w", rows=side, columns=side)


def _unet(config: UNetConfig) -> UNet:
    return UNet(config) if config.inner is None else NestedUNet(config)


def empty_model(config: UNetConfig) -> UNet:
    """Make the model of a config with parameters that have no memory yet (on the meta device), in channels_last format.

    They are given their first values by `materialise`, or those of a state dict by `load_state_dict(assign=True)`.
    """
    with torch.device("meta"):
        return _unet(config).to(memory_format=torch.channels_last)


def build_model(config: UNetConfig) -> UNet:
    """Make the model of a config, freshly initialised on torch's default device, in channels_last memory."""
    model, device = empty_model(config), torch.get_default_device()
    return model.to(device) if device.type == "meta" else materialise(model, device)
