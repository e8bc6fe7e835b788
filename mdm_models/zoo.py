"""The named models: `create_model("mdm_t2i_256")`, `list_models("mdm_t2v_*")`."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable

import torch

from mdm_models.config import UNetConfig
from mdm_models.pretrained import from_pretrained
from mdm_models.shipped import shipped_names
from mdm_models.unet import UNet, build_model

_CONFIGS: dict[str, Callable[[], UNetConfig]] = {}


def _named(function: Callable[[], UNetConfig]) -> Callable[[], UNetConfig]:
    _CONFIGS[function.__name__] = function
    return function


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List the names of models that match a shell wildcard, sorted; pretrained: those whose weights come along."""
    return sorted(fnmatch.filter(shipped_names() if pretrained else _CONFIGS, pattern))


def model_config(name: str, **overrides) -> UNetConfig:
    """Give the config of a named model; overrides replace fields of its outermost UNet.

    `context_dim` and `context_proj_dim` reach the innermost UNet, which holds the text layers.
    Raises ValueError for a name or a field that does not exist.
    """
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list_models())}"
        raise ValueError(f"no model named {name!r}; {hint}")
    return _replaced(_CONFIGS[name](), overrides)


def _replaced(config: UNetConfig, overrides: dict) -> UNetConfig:
    text = {key: overrides[key] for key in ("context_dim", "context_proj_dim") if key in overrides}
    if text and config.inner is not None:
        overrides = {key: value for key, value in overrides.items() if key not in text}
        overrides["inner"] = _replaced(config.inner, text)
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown model options {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return dataclasses.replace(config, **overrides)


def how_to_get(name: str) -> str:
    """Say where the weights of a named model are to be had that do not come along."""
    return (
        f"no weights of {name} come with this package, only those of {', '.join(shipped_names()) or 'none'}: "
        "download a checkpoint of apple/ml-mdm (its README links vis_model.pth for 64, 256 and 1024), run "
        "`mdm convert vis_model.pth DIR`, and give DIR to mdm sample or mdm_models.from_pretrained"
    )


def create_model(name: str, pretrained: bool = False, **overrides) -> UNet:
    """Make a named model, freshly initialised in training mode; `overrides` as in `model_config`.

    pretrained: with the weights that come with this package, in float32, in evaluation mode. Raises ValueError where
    there are none, which says where they are to be had, and for overrides, which those weights would not fit.
    """
    if not pretrained:
        return build_model(model_config(name, **overrides))
    if name not in shipped_names():
        model_config(name)
        raise ValueError(how_to_get(name))
    if overrides:
        raise ValueError(f"{', '.join(sorted(overrides))}: a pretrained model is as it was trained")
    return from_pretrained(name, dtype=torch.float32)


@_named
def mdm_t2i_64() -> UNetConfig:
    """Text to pictures of 64², the official model; the innermost one of the larger ones."""
    return UNetConfig(
        channels=(256, 512, 768),
        blocks=(2, 2, 2),
        attention=(0, 1, 5),
        attention_ffn=True,
        mid_blocks=True,
        micro=(("scale", 64.0),),
        context_dim=2048,
        context_proj_dim=2048,
        masked_context=False,
    )


@_named
def mdm_t2i_256() -> UNetConfig:
    """Text to pictures of 256² and 64², the official model."""
    return UNetConfig(channels=(64, 128, 256), blocks=(2, 2, 1), micro=(("scale", 256.0),), inner=mdm_t2i_64())


@_named
def mdm_t2i_1024() -> UNetConfig:
    """Text to pictures of 1024², 256² and 64², the official model."""
    middle = dataclasses.replace(mdm_t2i_256(), normalize_input=True)
    return UNetConfig(channels=(32, 32, 64), blocks=(2, 2, 1), micro=(("scale", 1024.0),), inner=middle)


@_named
def mdm_c2i_64() -> UNetConfig:
    """ImageNet classes to pictures of 64²: the one-hot class is the single text token."""
    return dataclasses.replace(mdm_t2i_64(), context_dim=1000)


@_named
def mdm_c2i_256() -> UNetConfig:
    """ImageNet classes to pictures of 256² and 64², the class given as to mdm_c2i_64."""
    return dataclasses.replace(mdm_t2i_256(), inner=mdm_c2i_64())


@_named
def mdm_t2v_64() -> UNetConfig:
    """Text to clips: 16 frames of 64² around one frame of 64²."""
    return UNetConfig(
        channels=(256,) * 5,
        blocks=(2, 2, 2, 2, 1),
        kind="time",
        temporal_attention=(1, 1, 1, 1, 0),
        micro=(("scale", 64.0),),
        inner=mdm_t2i_64(),
    )


@_named
def mdm_t2v_256() -> UNetConfig:
    """Text to clips: 16 frames of 256² around 16 frames of 64² around one frame of 64²."""
    return UNetConfig(
        channels=(64, 128, 256), blocks=(2, 2, 1), kind="space", micro=(("scale", 256.0),), inner=mdm_t2v_64()
    )


@_named
def mdm_t2i_tiny() -> UNetConfig:
    """Text to pictures of 32²: the inner UNet of mdm_t2v_tiny, for a CPU."""
    return UNetConfig(
        channels=(32, 64, 64),
        blocks=(1, 1, 1),
        attention=(0, 0, 1),
        attention_ffn=True,
        num_heads=4,
        mid_blocks=True,
        embed_dim=128,
        micro=(("scale", 32.0),),
        context_dim=64,
        masked_context=True,
    )


@_named
def mdm_t2i_tiny_64() -> UNetConfig:
    """Text to pictures of 64² around mdm_t2i_tiny, for a CPU."""
    return UNetConfig(
        channels=(32, 32), blocks=(1, 1), embed_dim=128, micro=(("scale", 64.0),), inner=mdm_t2i_tiny()
    )


@_named
def mdm_t2v_tiny() -> UNetConfig:
    """Text to clips: 8 frames of 32² around one frame of 32², for a CPU."""
    return UNetConfig(
        channels=(32, 32, 32, 32),
        blocks=(1, 1, 1, 1),
        kind="time",
        temporal_attention=(0, 1, 1, 0),
        embed_dim=128,
        micro=(("scale", 32.0),),
        inner=mdm_t2i_tiny(),
    )


@_named
def mdm_t2i_emoji_16() -> UNetConfig:
    """Text to pictures of 16², for a CPU: most of its weights work at 4² and 8², where a weight costs few operations a
    sample."""
    return UNetConfig(
        channels=(64, 160, 224),
        blocks=(1, 1, 1),
        attention=(0, 1, 1),
        attention_ffn=True,
        num_heads=4,
        mid_blocks=True,
        embed_dim=384,
        norm_groups=16,
        context_dim=128,
    )


@_named
def mdm_t2i_emoji_64() -> UNetConfig:
    """Text to pictures of 64² around mdm_t2i_emoji_16, a narrow level."""
    return UNetConfig(
        channels=(32, 48, 64), blocks=(1, 1, 1), embed_dim=384, norm_groups=16, inner=mdm_t2i_emoji_16()
    )


@_named
def mdm_t2v_emoji() -> UNetConfig:
    """Text to clips: 8 frames of 32² around 8 frames of 16² around mdm_t2i_emoji_16, one frame."""
    clip = UNetConfig(
        channels=(32, 32, 32, 32),
        blocks=(1, 1, 1, 1),
        kind="time",
        temporal_attention=(0, 1, 1, 0),
        temporal_head_dim=16,
        embed_dim=384,
        norm_groups=16,
        inner=mdm_t2i_emoji_16(),
    )
    return UNetConfig(channels=(32, 32), blocks=(1, 1), kind="space", embed_dim=384, norm_groups=16, inner=clip)


@_named
def mdm_t2i_emoji_128() -> UNetConfig:
    """Text to pictures of 128² around 32², for a GPU."""
    inner = UNetConfig(
        channels=(128, 256, 384),
        blocks=(2, 2, 2),
        attention=(0, 1, 2),
        attention_ffn=True,
        mid_blocks=True,
        embed_dim=512,
        context_dim=128,
    )
    return UNetConfig(channels=(64, 64, 128), blocks=(2, 2, 1), embed_dim=512, inner=inner)
