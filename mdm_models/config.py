"""What a model is: one frozen dataclass per UNet, the inner UNet inside the outer one's config."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass

KINDS = ("image", "space", "time")


@dataclass(frozen=True)
class UNetConfig:
    """One UNet; `inner` is the UNet nested in place of its middle blocks (None: the innermost, an ordinary UNet).

    It halves its resolution between runs of residual blocks; tuples have one entry a resolution, the highest first.
    Source: Gu et al., "Matryoshka Diffusion Models", ICLR 2024, section 3.2 and appendix; video after the same paper.
    """

    channels: tuple[int, ...]
    """width at each resolution"""
    blocks: tuple[int, ...]
    """residual blocks at each resolution on the way down (one more on the way up)"""
    kind: str = "image"
    """what halving the resolution does: "image" height and width of an image, "space" height and width of every frame
    of a clip, "time" the number of frames"""
    attention: tuple[int, ...] = ()
    """attention layers after each residual block; () for none"""
    attention_ffn: bool = False
    """a feed-forward layer after each attention layer"""
    num_heads: int = 8
    """heads of image and text attention"""
    temporal_attention: tuple[int, ...] = ()
    """attention layers over frames after each residual block ("time" only); () for none"""
    temporal_head_dim: int = 32
    """width of one head of temporal attention"""
    rotary: bool = False
    """rotary frame positions in temporal attention"""
    mid_blocks: bool = False
    """two residual blocks with an attention layer between them (innermost only)"""
    embed_dim: int = 1024
    """width of the time embedding, the same in every nested UNet"""
    norm_groups: int = 32
    """groups of every GroupNorm"""
    dropout: float = 0.0
    """dropout probability inside residual blocks"""
    image_channels: int = 3
    """channels of the images"""
    micro: tuple[tuple[str, float], ...] = ()
    """micro-conditions and their default values, such as (("scale", 64.0),)"""
    normalize_input: bool = False
    """divide the noisy input (of a clip: each frame) by its standard deviation"""
    in_adapter: bool = True
    """hand the outer features to the inner UNet"""
    adapters_see_grid: bool = False
    """the adapters of a clip see its frames side by side as one n×n picture, as in the official code, so that their 3×3
    kernels cross the borders between frames"""
    context_dim: int = 0
    """width of the text features; 0 for an unconditional model (innermost only)"""
    context_proj_dim: int = 0
    """project the text features to this width first; 0 for no projection"""
    context_layers: int = 0
    """self-attention layers over the projected text features"""
    masked_context: bool = True
    """attention leaves padded text tokens out (the innermost decides for all)"""
    inner: "UNetConfig | None" = None
    """the nested UNet"""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), _HINTS[field.name])
        self._check_sizes()
        resolutions = len(self.channels)
        if resolutions == 0 or len(self.blocks) != resolutions:
            raise ValueError(
                f"channels {self.channels} and blocks {self.blocks} must have one entry a resolution, at least one"
            )
        for name in ("attention", "temporal_attention"):
            layers = getattr(self, name)
            if layers and len(layers) != resolutions:
                raise ValueError(
                    f"{name} {layers} must be () or have one entry a resolution, of which there are {resolutions}"
                )
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(KINDS)}")
        if any(self.temporal_attention) and self.kind != "time":
            raise ValueError(f"temporal_attention needs kind 'time', not {self.kind!r}")
        if self.inner is None and self.kind != "image":
            raise ValueError(f"the innermost UNet sees one frame: its kind must be 'image', not {self.kind!r}")
        if self.inner is not None:
            self._check_nesting(self.inner)
        self._check_heads()

    def _check_sizes(self) -> None:
        for name in ("num_heads", "temporal_head_dim", "embed_dim", "norm_groups", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("context_dim", "context_proj_dim", "context_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        for name, least in (("channels", 1), ("blocks", 1), ("attention", 0), ("temporal_attention", 0)):
            if any(entry < least for entry in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must have entries of at least {least}")
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"channels {self.channels} must all be multiples of norm_groups {self.norm_groups}")
        if self.embed_dim % 8:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 8")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and less than 1")

    def _check_heads(self) -> None:
        attending = [width for width, layers in zip(self.channels, self.attention, strict=False) if layers]
        if self.mid_blocks:
            attending.append(self.channels[-1])
        over_time = [width for width, layers in zip(self.channels, self.temporal_attention, strict=False) if layers]
        for width in attending:
            if width % self.num_heads:
                raise ValueError(
                    f"channels {width} of a resolution with attention must be a multiple of num_heads {self.num_heads}"
                )
        for width in over_time:
            if width % self.temporal_head_dim:
                raise ValueError(
                    f"channels {width} of a resolution with temporal_attention must be a multiple of "
                    f"temporal_head_dim {self.temporal_head_dim}"
                )
        if self.is_video and attending and self.context_width:
            raise ValueError("attention to text needs kind 'image': a clip has one text for many frames")

    def _check_nesting(self, inner: "UNetConfig") -> None:
        if self.mid_blocks or self.context_dim:
            raise ValueError("mid_blocks, context_dim: an outer UNet has its inner UNet in the middle and for the text")
        if inner.embed_dim != self.embed_dim:
            raise ValueError(f"embed_dim {self.embed_dim} differs from the inner UNet's {inner.embed_dim}")
        if inner.image_channels != self.image_channels:
            raise ValueError(
                f"image_channels {self.image_channels} differs from the inner UNet's {inner.image_channels}"
            )
        if self.kind == "image" and any(config.kind != "image" for config in inner.levels):
            raise ValueError("an image UNet cannot hold a video UNet: its kind must be 'space' or 'time'")
        if self.adapters_see_grid and not inner.fills_grid:
            frames, _ = inner.strides[-1]
            raise ValueError(f"adapters_see_grid needs a square number of frames inside, 1, 4, 16, …, not {frames}")

    @property
    def levels(self) -> list["UNetConfig"]:
        """Every UNet's config, outermost first."""
        return [self] + (self.inner.levels if self.inner else [])

    @property
    def innermost(self) -> "UNetConfig":
        return self.levels[-1]

    @property
    def is_video(self) -> bool:
        return self.kind != "image"

    @property
    def context_width(self) -> int:
        """Width of the text features that attention layers see, after the projection."""
        return self.innermost.context_proj_dim or self.innermost.context_dim

    @property
    def nest_stride(self) -> tuple[int, int]:
        """(time, space) ratio between this level's sizes and those of the next inner level."""
        ratio = 2 ** (len(self.channels) - 1)
        return (ratio, 1) if self.kind == "time" else (1, ratio)

    @property
    def strides(self) -> list[tuple[int, int]]:
        """(time, space) ratio of the outermost level's sizes to each level's: [(1, 1), ...]."""
        strides = [(1, 1)]
        for outer in self.levels[:-1]:
            time, space = outer.nest_stride
            strides.append((strides[-1][0] * time, strides[-1][1] * space))
        return strides

    @property
    def fills_grid(self) -> bool:
        """Whether the frames that this level sees fill an n×n picture."""
        frames, _ = self.strides[-1]
        return math.isqrt(frames) ** 2 == frames

    @property
    def scales(self) -> list[float]:
        """Each level's resolution over the innermost one's, for the noise schedule: space ratio · √(time ratio)."""
        time, space = self.strides[-1]
        return [space / s * math.sqrt(time / t) for t, s in self.strides]

    def noise_scales(self, size: int, unshifted: int) -> list[float]:
        """Give `scales` of a model that works at `size`, relative to the size `unshifted` in place of the innermost
        level's; 0 for that of the innermost level, as in the paper."""
        innermost = self.sample_shapes(size)[-1][-1]
        return [scale * innermost / (unshifted or innermost) for scale in self.scales]

    def sample_shapes(self, size: int) -> list[tuple[int, ...]]:
        """Give the shape of one sample at every level, highest resolution first: (C, H, W) of an image, (C, T, H, W) of
        a clip. `size` is the highest level's height and width; the innermost level sees one frame.

        Raises ValueError if the levels cannot halve that size often enough.
        """
        frames, space = self.strides[-1]
        multiple = space * 2 ** (len(self.innermost.channels) - 1)
        if size < 1 or size % multiple:
            raise ValueError(f"size is {size}; this model needs a multiple of {multiple}")
        return [
            (self.image_channels, *([frames // time] if self.is_video else []), size // space, size // space)
            for time, space in self.strides
        ]

    def to_dict(self) -> dict:
        """Give the fields as a dict for JSON, those of `inner` as one inside it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "UNetConfig":
        """Make a config of what `to_dict` gave, also after a trip through JSON (lists for tuples).

        Raises ValueError for a key that is unknown or missing and for a value that no model can have, TypeError for a
        value of a wrong type; each names the key.
        """
        if not isinstance(values, dict):
            raise TypeError(f"a UNet's config is {values!r}; it must be a dict")
        if unknown := sorted(set(values) - set(_HINTS)):
            raise ValueError(f"unknown config keys {', '.join(unknown)}; known are {', '.join(sorted(_HINTS))}")
        if missing := sorted(set(_HINTS) - set(values)):
            raise ValueError(f"config keys {', '.join(missing)} are missing")
        values = {key: _tuples(value) for key, value in values.items()}
        if values["inner"] is not None:
            values["inner"] = cls.from_dict(values["inner"])
        return cls(**values)


_HINTS = typing.get_type_hints(UNetConfig)  # the type of each field


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _check_type(name: str, value, hint) -> None:
    if not _has_type(value, hint):
        expected = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
        raise TypeError(f"{name} is {value!r}; it must be of type {expected}")


def _has_type(value, hint) -> bool:
    """Whether a value fits the annotation of a field of `UNetConfig`; ints pass for floats, bools do not for ints."""
    if typing.get_origin(hint) is tuple:
        inside = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inside[-1] is Ellipsis:
            return all(_has_type(entry, inside[0]) for entry in value)
        return len(value) == len(inside) and all(map(_has_type, value, inside))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
