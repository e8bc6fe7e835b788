"""The configs and checkpoints of the official code (apple/ml-mdm), converted to ours."""

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mdm_models.config import UNetConfig
from mdm_models.errors import one_line
from mdm_models.pretrained import check_finite, fitting_model, placed, renamed, with_weights
from mdm_models.unet import UNet
from mdm_models.zoo import model_config

# What official checkpoints name beside tensors: the settings of the training run, as instances of the official classes
# (under the names that its modules had over the years), and numbers of numpy. None of it is imported or called here.
_IGNORED = (
    "argparse.Namespace",
    "_codecs.encode",
    *(f"{module}." for module in ("numpy", "ml_mdm", "config", "models", "diffusion", "samplers", "reader")),
    *(f"{module}." for module in ("language_models", "distributed", "trainer")),
)

# Official module names → ours, applied in this order to every key. The first are what torch's wrappers put before them.
_RENAMES = [
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"\binner_unet\.", "inner."),
    (r"\btemb_layer([12])\.", r"time_embed.fc\1."),
    (r"\bcond_layers\.(\w+)\.0\.", r"micro_embed.\1.fc1."),
    (r"\bcond_layers\.(\w+)\.1\.", r"micro_embed.\1.fc2."),
    (r"\bcond_emb\.", "text.pool."),
    (r"\blm_proj\.", "text.proj."),
    (r"\blm_head\.(\d+)\.", r"text.layers.\1."),
    (r"\bmid_blocks\.0\.resnets\.0\.", "middle_blocks.0."),
    (r"\bmid_blocks\.0\.attn\.0\.", "middle_blocks.1."),
    (r"\bmid_blocks\.1\.resnets\.0\.", "middle_blocks.2."),
    (r"\b(down|up)_blocks\.", r"\1."),
    (r"\bt_attn\.(\d+)\.", r"temporal.\1."),
    (r"\.attn\.(\d+)\.", r".attention.\1."),
    (r"\.attn\.", "."),
    (r"\.mlp\.main\.0\.", ".mlp_norm."),
    (r"\.mlp\.main\.1\.", ".mlp.fc1."),
    (r"\.mlp\.main\.3\.", ".mlp.fc2."),
    (r"\.ffn\.0\.", ".ffn_norm."),
    (r"\.ffn\.1\.", ".ffn.fc1."),
    (r"\.ffn\.3\.", ".ffn.fc2."),
    (r"\.resample\.", ".resample.conv."),
    (r"\.time_layer\.", ".film."),
    (r"\.conv3\.", ".skip."),
    (r"\.norm_cond\.", ".context_norm."),
    (r"\.kv_cond\.", ".context_kv."),
    (r"\.proj_out\.", ".proj."),
    (r"\.down_conv\.", ".down."),
    (r"\.up_conv\.", ".up."),
]


def config_from_official(config: dict) -> UNetConfig:
    """Convert an official `UNetConfig` or `NestedUNetConfig`, given as the dict of its fields, to ours.

    Raises ValueError for a field that changes the model in a way ours does not have.
    """
    return _level(config, embed_dim=_embed_dim(config), context_dim=config["conditioning_feature_dim"])


def _embed_dim(config: dict) -> int:
    if config.get("temporal_dim"):
        return config["temporal_dim"]
    return 4 * config["resolution_channels"][0]


def _level(config: dict, embed_dim: int, context_dim: int) -> UNetConfig:
    if config.get("interp_conditioning"):
        raise ValueError("official config: interp_conditioning is set; its layers are not part of the model's output")
    if config.get("micro_conditioning"):
        pairs = (item.split(":") for item in config["micro_conditioning"].split(","))
        micro = tuple((name, float(default)) for name, default in pairs)
    else:
        micro = ()
    resnet = config["resnet_config"]
    resolutions = len(config["resolution_channels"])
    levels = config["attention_levels"]
    if (levels or not config["skip_mid_blocks"]) and resnet["num_groups_norm"] != 32:
        raise ValueError(
            f"official config: num_groups_norm is {resnet['num_groups_norm']}; attention there always has 32 groups"
        )
    attention = tuple(n if i in levels else 0 for i, n in enumerate(config["num_attention_layers"]))
    temporal = tuple(config.get("num_temporal_attention_layers") or ())[:resolutions]
    kind = ("space" if config["temporal_spatial_ds"] else "time") if config["temporal_mode"] else "image"
    proj_dim = max(config["conditioning_feature_proj_dim"], 0)
    shared = {
        "channels": tuple(config["resolution_channels"]),
        "blocks": tuple(config["num_resnets_per_resolution"]),
        "kind": kind,
        "attention": attention if any(attention) else (),
        "attention_ffn": resnet["use_attention_ffn"],
        "temporal_attention": temporal if kind == "time" else (),
        "rotary": config["temporal_positional_encoding"],
        "embed_dim": embed_dim,
        "norm_groups": resnet["num_groups_norm"],
        "dropout": resnet["dropout"],
        "micro": micro,
    }
    inner = config.get("inner_config")
    if inner is None:
        return UNetConfig(
            mid_blocks=not config["skip_mid_blocks"],
            context_dim=max(context_dim, 0),
            context_proj_dim=proj_dim if context_dim > 0 else 0,
            context_layers=config["num_lm_head_layers"],
            masked_context=bool(config["masked_cross_attention"]),
            **shared,
        )
    if not config["skip_mid_blocks"]:
        raise ValueError("official config: a nested UNet with middle blocks of its own (skip_mid_blocks: false)")
    passed_on = proj_dim if context_dim > 0 and proj_dim else context_dim
    inner = _level(inner, embed_dim, passed_on)
    return UNetConfig(
        normalize_input=not config["skip_normalization"],
        in_adapter=not config["skip_inner_unet_input"],
        adapters_see_grid=kind != "image" and inner.fills_grid,  # it knows no other numbers of frames
        inner=inner,
        **shared,
    )


def named_config(name: str) -> UNetConfig:
    """Give the config of a named model as the official code runs its weights: a clip's adapters see its frames as one
    grid.

    Raises ValueError for a name that does not exist.
    """
    return _seeing_grids(model_config(name))


def _seeing_grids(config: UNetConfig) -> UNetConfig:
    if config.inner is None:
        return config
    as_grid = config.is_video and config.inner.fills_grid
    return dataclasses.replace(config, adapters_see_grid=as_grid, inner=_seeing_grids(config.inner))


def state_dict_from_official(
    state_dict: Mapping[str, Tensor], source: str | Path = "the state dict"
) -> dict[str, Tensor]:
    """Convert an official model's state dict to ours: new names, and 1×1 convolutions inside attention as Linear
    weights.

    The frequencies of rotary positions, which are saved there but never trained, are left out. source: what errors call
    it. Raises ValueError in one line for two tensors that have one of our names.
    """
    trained = {key: value for key, value in state_dict.items() if not key.endswith(".pos_emb.freqs")}
    return {key: _converted(key, value) for key, value in renamed(trained, _our_name, source).items()}


def _our_name(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _converted(key: str, value: Tensor) -> Tensor:
    is_pointwise = value.dim() == 4 and value.shape[2:] == (1, 1) and not key.endswith(".skip.weight")
    return value.flatten(1) if is_pointwise else value


def load_checkpoint(
    path: str | Path, name: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> UNet:
    """Load an official .pth file into the model `name` ("mdm_t2i_64", ...), in evaluation mode.

    dtype: of the weights; None: that of the file. The file is read without running any code in it. Raises
    FileNotFoundError, or ValueError in one line if the file is damaged, is no official checkpoint, or is one of another
    model.
    """
    weights = state_dict_from_official(read_checkpoint(path), path)
    model = fitting_model(named_config(name), weights, path, dtype)
    check_finite(weights, path)
    own = model.state_dict()
    return with_weights(model, {key: placed(weights.pop(key), own[key], dtype, device) for key in own})


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the official state dict in a .pth file. Errors as in `load_checkpoint`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    _check_archive(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [name for name in names if not name.startswith(_IGNORED)]
        checkpoint = None if foreign else _unpickled(path, names)
    except Exception as error:  # wrong bytes make an unpickler raise nearly anything
        raise ValueError(f"{path} is not a readable checkpoint: {one_line(error).split('. ')[0]}") from None
    if foreign:
        reason = f"reading it could run {', '.join(foreign)}, which no official checkpoint has"
        raise ValueError(f"{path} is refused: {reason}")
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    ):
        remedy = "torch.save({'state_dict': model.state_dict()}, path) makes one of an official model"
        raise ValueError(f"{path} is not an official checkpoint: it has no tensors under 'state_dict'; {remedy}")
    for key, value in state_dict.items():
        if value.is_meta or value.layout != torch.strided:
            kind = "without values, on the meta device" if value.is_meta else f"stored as {value.layout}"
            raise ValueError(f"{path} is not an official checkpoint: its {key} is {kind}; save a dense tensor")
    return state_dict


def _unpickled(path: Path, ignored: list[str]) -> object:
    """What torch.load makes of the file, with `_Ignored` in the place of everything that has one of these names."""
    with torch.serialization.safe_globals([(_Ignored, name) for name in ignored]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """ValueError unless the file is whole: an archive as torch.save makes, each record with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except PermissionError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        reason = f"{one_line(error)}; get it anew"
        raise ValueError(f"{path} is no checkpoint of torch.save, or not all of one: {reason}") from None
    if damaged:
        raise ValueError(f"{path} is damaged: its record {damaged!r} has another checksum than when it was written")


class _Ignored:
    """Stands for whatever a checkpoint holds beside the weights (settings, numbers of numpy): made, never used."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass
