"""Checkpoints of the port of Matryoshka Diffusion to diffusers (examples/community/matryoshka.py there), converted.

A repository of the port has a folder for each model, unet/nesting_level_0 (64²), _1 (256²) and _2 (1024²), with the
weights in diffusion_pytorch_model.safetensors. The layers are those of the official models under other names; only the
attention layers at a resolution have two numbers: that of the residual block before them, and their own after it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mdm_models.pretrained import renamed
from mdm_models.storage import mapped, opened

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# The port's module names → ours, applied in this order to every key.
_RENAMES = [
    (r"\binner_unet\.", "inner."),
    (r"\btime_embedding\.linear_([12])\.", r"time_embed.fc\1."),
    (r"\badd_embedding\.add_timestep_embedder\.linear_([12])\.", r"micro_embed.scale.fc\1."),
    (r"\badd_embedding\.cond_emb\.", "text.pool."),
    (r"\bencoder_hid_proj\.", "text.proj."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bmid_block\.resnets\.0\.", "middle_blocks.0."),
    (r"\bmid_block\.attentions\.0\.transformer_blocks\.0\.", "middle_blocks.1."),
    (r"\bmid_block\.resnets\.1\.", "middle_blocks.2."),
    (r"\b(down|up)_blocks\.", r"\1."),
    (r"\.(?:down|up)samplers\.0\.conv\.", ".resample.conv."),
    (r"\.time_emb_proj\.", ".film."),
    (r"\.conv_shortcut\.", ".skip."),
    (r"\.attn1\.group_norm\.", ".norm."),
    (r"\.attn1\.to_qkv\.", ".qkv."),
    (r"\.attn2\.norm_cross\.", ".context_norm."),
    (r"\.attn2\.to_kv\.", ".context_kv."),
    (r"\.proj_out\.", ".proj."),
    (r"\.ff\.group_norm\.", ".ffn_norm."),
    (r"\.ff\.linear_gelu\.proj\.", ".ffn.fc1."),
    (r"\.ff\.linear_out\.", ".ffn.fc2."),
]
_ATTENTION = re.compile(r"(.*\b(?:down|up)\.\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.(.*)")


def state_dict_from_port(
    state_dict: Mapping[str, Tensor], source: str | Path = "the state dict"
) -> dict[str, Tensor]:
    """Convert a state dict of the port to ours: new names for the same tensors.

    source: what errors call it. Raises ValueError in one line for two tensors that have one of our names.
    """
    layers = {}  # resolution → attention layers after each of its residual blocks
    for match in filter(None, map(_ATTENTION.fullmatch, map(_renamed, state_dict))):
        layers[match[1]] = max(layers.get(match[1], 0), int(match[3]) + 1)

    def our_name(key: str) -> str:
        key = _renamed(key)
        if not (match := _ATTENTION.fullmatch(key)):
            return key
        return f"{match[1]}.attention.{int(match[2]) * layers[match[1]] + int(match[3])}.{match[4]}"

    return renamed(state_dict, our_name, source)


def _renamed(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def read_port(folder: Path) -> dict[str, Tensor]:
    """Read the port's state dict in one of its folders, mapped into memory.

    Raises FileNotFoundError if the folder has no weights, naming those inside it that have, ValueError if the file is
    damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"**/nesting_level_*/{WEIGHTS_FILE}"))
        remedy = f"name one of {', '.join(inside)}" if inside else f"it has no {WEIGHTS_FILE}"
        raise FileNotFoundError(f"{folder} is not a model of the diffusers port: {remedy}")
    with opened(path) as file:
        return mapped(file, file.keys())
