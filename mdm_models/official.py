"""The configs and checkpoints of the official code (apple/ml-mdm), converted to ours."""

import argparse
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from mdm_models.config import UNetConfig
from mdm_models.unet import UNet

_UNSUPPORTED = ("interp_conditioning",)

# Official module names → ours, applied in this order to every key.
_RENAMES = [
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
    """An official `UNetConfig` or `NestedUNetConfig`, as the dict of its fields, → ours.

    Raises ValueError for a field that changes the model in a way ours does not have.
    """
    return _level(config, embed_dim=_embed_dim(config), context_dim=config["conditioning_feature_dim"])


def _embed_dim(config: dict) -> int:
    if config.get("temporal_dim"):
        return config["temporal_dim"]
    return 4 * config["resolution_channels"][0]


def _level(config: dict, embed_dim: int, context_dim: int) -> UNetConfig:
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"official config: {name} is set; its layers are not part of the model's output")
    if config.get("micro_conditioning"):
        pairs = (item.split(":") for item in config["micro_conditioning"].split(","))
        micro = tuple((name, float(default)) for name, default in pairs)
    else:
        micro = ()
    resnet = config["resnet_config"]
    stages = len(config["resolution_channels"])
    levels = config["attention_levels"]
    attention = tuple(n if i in levels else 0 for i, n in enumerate(config["num_attention_layers"]))
    temporal = tuple(config.get("num_temporal_attention_layers") or ())[:stages]
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
    return UNetConfig(
        normalize_input=not config["skip_normalization"],
        in_adapter=not config["skip_inner_unet_input"],
        adapters_see_grid=kind != "image",
        inner=_level(inner, embed_dim, passed_on),
        **shared,
    )


def state_dict_from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official model's state dict → ours: new names, and 1×1 convolutions inside attention as Linear weights."""
    return dict(_converted(key, value) for key, value in state_dict.items())


def _converted(key: str, value: Tensor) -> tuple[str, Tensor]:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    is_pointwise = value.dim() == 4 and value.shape[2:] == (1, 1) and not key.endswith(".skip.weight")
    return key, value.flatten(1) if is_pointwise else value


def load_checkpoint(path: str | Path, name: str) -> UNet:
    """An official .pth file → the model `name` ("mdm_t2i_64", ...) with its weights, in evaluation mode.

    The file is read without running any code in it. Raises FileNotFoundError, or ValueError in one line if the file is
    damaged, is no official checkpoint, or is one of another model.
    """
    from mdm_models.zoo import create_model

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable official checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path}: not an official checkpoint: it has no 'state_dict'")
    return _filled(create_model(name), state_dict_from_official(checkpoint["state_dict"]), path, name)


def _filled(model: UNet, state_dict: dict[str, Tensor], path: Path, name: str) -> UNet:
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state_dict.keys())
    wrong += [key for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
    if wrong:
        raise ValueError(
            f"{path}: a checkpoint of another model than {name}: {len(wrong)} tensors differ, as {wrong[0]}"
        )
    model.load_state_dict(state_dict)
    return model.eval()
