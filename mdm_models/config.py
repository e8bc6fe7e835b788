"""What a model is: one frozen dataclass per UNet, the inner UNet inside the outer one's config."""

import dataclasses
import math
from dataclasses import dataclass

KINDS = ("image", "space", "time")


@dataclass(frozen=True)
class UNetConfig:
    """One UNet; `inner` is the UNet nested in place of its middle blocks (None: the innermost, an ordinary UNet).

    A stage is a run of residual blocks at one resolution; tuples have one entry a stage, highest resolution first.
    Source: Gu et al., "Matryoshka Diffusion Models", ICLR 2024, section 3.2 and appendix; video after the same paper.
    """

    channels: tuple[int, ...]
    """width of each stage"""
    blocks: tuple[int, ...]
    """residual blocks in each stage on the way down (one more on the way up)"""
    kind: str = "image"
    """what halving between stages does: "image" height and width of an image, "space" height and width of every frame
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
        stages = len(self.channels)
        if stages == 0 or len(self.blocks) != stages:
            raise ValueError(
                f"channels {self.channels} and blocks {self.blocks} must have one entry a stage, at least one"
            )
        for name in ("attention", "temporal_attention"):
            layers = getattr(self, name)
            if layers and len(layers) != stages:
                raise ValueError(f"{name} {layers} must be () or have one entry for each of the {stages} stages")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(KINDS)}")
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"channels {self.channels} must all be multiples of norm_groups {self.norm_groups}")
        if any(self.temporal_attention) and self.kind != "time":
            raise ValueError(f"temporal_attention needs kind 'time', not {self.kind!r}")
        if self.inner is None and self.kind != "image":
            raise ValueError(f"the innermost UNet sees one frame: its kind must be 'image', not {self.kind!r}")
        if self.embed_dim % 8:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of 8")
        if self.inner is not None:
            self._check_nesting(self.inner)

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
    def scales(self) -> list[float]:
        """Each level's resolution over the innermost one's, for the noise schedule: space ratio · √(time ratio)."""
        time, space = self.strides[-1]
        return [space / s * math.sqrt(time / t) for t, s in self.strides]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "UNetConfig":
        """The inverse of `to_dict`, also after a trip through JSON (lists for tuples). ValueError for unknown keys."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown config keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        values = {key: _tuples(value) if isinstance(value, list) else value for key, value in values.items()}
        if values.get("inner") is not None:
            values["inner"] = cls.from_dict(values["inner"])
        return cls(**values)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
