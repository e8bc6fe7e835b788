"""Run the official code on small models of every kind that its configs allow, and keep inputs and outputs.

  pip install torchinfo rotary-embedding-torch
  python -m tests.golden.make_variants CHECKOUT OUT_DIR      CHECKOUT: the folder of apple/ml-mdm that holds ml_mdm/

The weights are `drawn_weights` of their names and shapes, so the files hold none. The official code takes a clip as an
n×n grid of frames in one image, so it knows 1, 4, 16… frames only, and it miscounts the frames of some chains of time
levels. Its layers do neither: the models called video_rows_… are run with the frames as rows, by taking off the wrapper
that cuts the grid.
"""

import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models.golden import drawn_weights

CONTEXT = 40


def import_official(checkout: Path) -> None:
    """Make `ml_mdm.models` importable without what the official code needs for training and downloads."""

    def stub(name: str, path: Path | None = None, **attributes) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        if path:
            module.__path__ = [str(path)]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        return module

    def register(*names):
        return lambda cls: cls

    stub("ml_mdm", checkout / "ml_mdm")
    stub("ml_mdm.models", checkout / "ml_mdm" / "models")
    stub("ml_mdm.config", register_model_config=register, register_model=register)
    stub("ml_mdm.s3_helpers")
    stub("ml_mdm.utils")
    stub("ml_mdm.utils.fix_old_checkpoints")


def unet(**fields) -> dict:
    """Fields of an innermost official UNet of two resolutions."""
    return {
        "num_resnets_per_resolution": [1, 1],
        "attention_levels": [1],
        "num_attention_layers": [0, 2],
        "conditioning_feature_dim": CONTEXT,
        "conditioning_feature_proj_dim": 48,
        "masked_cross_attention": 0,
        "resolution_channels": [32, 64],
        "micro_conditioning": "scale:16",
        "resnet_config": {"use_attention_ffn": True},
        **fields,
    }


def nested(inner: dict, resolutions: int = 2, **fields) -> dict:
    """Fields of an official UNet of so many resolutions around another."""
    return {
        "num_resnets_per_resolution": [1] * resolutions,
        "temporal_dim": 128,
        "attention_levels": [],
        "num_attention_layers": [0] * resolutions,
        "conditioning_feature_dim": CONTEXT,
        "resolution_channels": [32] * resolutions,
        "micro_conditioning": "scale:64",
        "skip_normalization": True,
        "resnet_config": {},
        "inner_config": {**inner, "nesting": True},
        **fields,
    }


def over_time(inner: dict, ratio: int, **fields) -> dict:
    """A time level that divides the frames by `ratio`, with rotary positions."""
    resolutions = ratio.bit_length()
    attention = {"num_temporal_attention_layers": [1] * resolutions, "temporal_positional_encoding": True}
    return nested(inner, resolutions, temporal_mode=True, **attention, **fields)


def over_space(inner: dict, **fields) -> dict:
    return nested(inner, temporal_mode=True, temporal_spatial_ds=True, **fields)


@dataclasses.dataclass
class Variant:
    config: dict
    sizes: list[int]
    """height = width of each level's images or frames, highest resolution first"""
    rows: list[int]
    """samples of each level"""
    frames: list[int] | None = None
    """frames of each level; None: images"""
    micro: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    context: int = CONTEXT


# A projection at the outer level, too, as in the official configs: the features come projected then.
ATTENTION_FIRST = {"attention_levels": [0], "num_attention_layers": [1, 0], "conditioning_feature_proj_dim": 48}
NORMALISED = {"skip_normalization": False}

VARIANTS = {
    "unet_two_micro": Variant(
        unet(micro_conditioning="scale:16,watermark:0.5"), [8], [2], micro={"scale": [8, 40], "watermark": [0.1, 0.9]}
    ),
    "unet_default_micro": Variant(
        unet(micro_conditioning="scale:16,watermark:0.5"), [8], [2], micro={"scale": [8, 40]}
    ),
    "unet_lm_head_unmasked": Variant(unet(num_lm_head_layers=2), [8], [2]),
    "unet_lm_head_unprojected": Variant(
        unet(num_lm_head_layers=1, masked_cross_attention=1, conditioning_feature_proj_dim=-1), [8], [2]
    ),
    "nested2_attention_first": Variant(
        nested(
            unet(attention_levels=[0, 1], num_attention_layers=[1, 2], masked_cross_attention=1), **ATTENTION_FIRST
        ),
        [16, 8],
        [2, 2],
        context=48,
    ),
    "nested3_mixed": Variant(
        nested(nested(unet(masked_cross_attention=1), **NORMALISED)),
        [32, 16, 8],
        [1, 2, 3],
        micro={"scale": [8, 12, 99]},
    ),
    "nested4_normalised": Variant(
        nested(nested(nested(unet(), **NORMALISED), **NORMALISED), **NORMALISED), [32, 16, 8, 4], [1] * 4
    ),
    "video_time16_rotary": Variant(over_time(unet(), 16, **NORMALISED), [8, 8], [1, 2], [16, 1]),
    "video_space_time4_mixed": Variant(
        over_space(over_time(unet(masked_cross_attention=1), 4), **NORMALISED), [16, 8, 8], [1, 2, 3], [4, 4, 1]
    ),
    "video_time4_time4": Variant(over_time(over_time(unet(), 4), 4), [8] * 3, [1] * 3, [16, 4, 1]),
    "video_rows_time2": Variant(over_time(unet(), 2, **NORMALISED), [8, 8], [2, 2], [2, 1]),
    "video_rows_time8": Variant(over_time(unet(), 8), [8, 8], [2, 2], [8, 1]),
    "video_rows_time2_time8": Variant(over_time(over_time(unet(), 8), 2), [8] * 3, [1] * 3, [16, 8, 1]),
    "video_rows_time4_space_time4": Variant(
        over_time(over_space(over_time(unet(), 4)), 4), [16, 16, 8, 8], [1] * 4, [16, 4, 4, 1]
    ),
}


def main(checkout: Path, directory: Path) -> None:
    import_official(checkout)
    from ml_mdm.models.unet import UNet

    wrapped = ("forward_input_layer", "forward_output_layer", "forward_downsample", "forward_upsample")
    cut_grids = {name: getattr(UNet, name) for name in wrapped}
    for name, variant in VARIANTS.items():
        as_rows = name.startswith("video_rows")
        for method, function in cut_grids.items():
            setattr(UNet, method, function.__closure__[0].cell_contents if as_rows else function)
        save_variant(directory / f"{name}.safetensors", variant, as_rows)


def save_variant(path: Path, variant: Variant, as_rows: bool) -> None:
    config = official_config(variant.config)
    fields = dataclasses.asdict(config)  # before the model changes it
    model = official_model(config)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items() if not k.endswith(".pos_emb.freqs")}
    model.load_state_dict(drawn_weights(shapes), strict=False)

    torch.manual_seed(0)
    samples = max(variant.rows)
    frames = variant.frames or [1] * len(variant.sizes)
    x = [torch.randn(r, 3, f, s, s) for r, f, s in zip(variant.rows, frames, variant.sizes, strict=True)]
    time = torch.tensor([3.0, 700.0, 20.0])[:samples]
    context, mask = torch.randn(samples, 5, variant.context), torch.ones(samples, 5)
    mask[-1, 2:] = 0
    micro = {name: torch.tensor(values, dtype=torch.float32) for name, values in variant.micro.items()}

    inputs = [as_frames(clip) if as_rows else as_grid(clip) for clip in x]
    with torch.no_grad():
        y = model(inputs if len(inputs) > 1 else inputs[0], time, context, mask, micro)
    y = y if isinstance(y, list) else [y]
    tensors = {"in.time": time, "in.context": context, "in.context_mask": mask}
    tensors |= {f"in.micro.{name}": values for name, values in micro.items()}
    for i, (clip, output) in enumerate(zip(x, y, strict=True)):
        clips = [clip, from_frames(output, clip) if as_rows else output]
        tensors[f"in.x{i}"], tensors[f"out.y{i}"] = clips if as_rows else (inputs[i], output)
    metadata = {
        "config": json.dumps(fields),
        "shapes": json.dumps(shapes, separators=(",", ":")),
        "params": str(sum(torch.Size(shape).numel() for shape in shapes.values())),
        "frames_grid": json.dumps(None if as_rows else [round(f**0.5) for f in frames]),
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {int(metadata['params']):,} parameters")


def official_config(fields: dict):
    from ml_mdm.models.nested_unet import NestedUNetConfig
    from ml_mdm.models.unet import ResNetConfig, UNetConfig

    fields = {**fields, "resnet_config": ResNetConfig(**fields["resnet_config"])}
    if "inner_config" not in fields:
        return UNetConfig(**fields)
    return NestedUNetConfig(**{**fields, "inner_config": official_config(fields["inner_config"])})


def official_model(config) -> nn.Module:
    from ml_mdm.models.nested_unet import NestedUNet, NestedUNetConfig
    from ml_mdm.models.unet import UNet

    return (NestedUNet if isinstance(config, NestedUNetConfig) else UNet)(3, 3, config).eval()


def as_grid(clip: Tensor) -> Tensor:
    """(B, C, n², H, W) → (B, C, n·H, n·W), frame = n·row + column."""
    n = round(clip.shape[2] ** 0.5)
    return clip.unflatten(2, (n, n)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def as_frames(clip: Tensor) -> Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W)."""
    return clip.transpose(1, 2).flatten(0, 1)


def from_frames(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_frames`, for as many frames as `like` has."""
    return rows.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
