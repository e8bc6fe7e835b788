"""Run small models of the port to diffusers, and keep inputs and outputs; list the tensors of its full-size models.

  pip install diffusers
  python -m tests.golden.make_port MATRYOSHKA_PY OUT_DIR      MATRYOSHKA_PY: diffusers' examples/community/matryoshka.py

The weights are `drawn_weights` of their names and shapes. The widths of a nested model follow from sizes that the port
has written into it (the time embedding is 1024 wide around levels of 64 and 32 channels).
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mdm_models import UNetConfig, model_config
from tests.models.golden import drawn_weights

INNER = UNetConfig(
    channels=(32, 64),
    blocks=(1, 1),
    attention=(0, 2),
    attention_ffn=True,
    mid_blocks=True,
    embed_dim=128,
    micro=(("scale", 16.0),),
    context_dim=40,
    context_proj_dim=48,
    masked_context=False,
)
WIDE_INNER = UNetConfig(**{**INNER.to_dict(), "channels": (256, 256), "embed_dim": 1024})
MIDDLE = UNetConfig(
    channels=(64, 64), blocks=(1, 1), micro=(("scale", 256.0),), normalize_input=True, inner=WIDE_INNER
)
OUTER = UNetConfig(channels=(32, 64), blocks=(1, 1), micro=(("scale", 1024.0),), inner=MIDDLE)
FULL_SIZE = ("mdm_t2i_64", "mdm_t2i_256", "mdm_t2i_1024")


def port_model(port, config: UNetConfig) -> nn.Module:
    cls = port.MatryoshkaUNet2DConditionModel if config.inner is None else port.NestedUNet2DConditionModel
    return cls(**port_config(config)).eval()


def port_config(config: UNetConfig, nesting: bool = False) -> dict:
    """Our config as the port's; `nesting`: it is inside another."""
    resolutions = len(config.channels)
    attention = config.attention or (0,) * resolutions
    blocks = ["CrossAttn" * bool(layers) for layers in attention]
    fields = {
        "block_out_channels": list(config.channels),
        "layers_per_block": list(config.blocks),
        "transformer_layers_per_block": list(attention),
        "down_block_types": [f"{kind}DownBlock2D" for kind in blocks],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(blocks)],
        "micro_conditioning_scale": int(config.micro[0][1]),
        "cross_attention_dim": config.context_width,
        "resnet_time_scale_shift": "scale_shift",
        "addition_embed_type": "matryoshka",
        "flip_sin_to_cos": False,
        "freq_shift": 0,
        "use_attention_ffn": config.attention_ffn,
        "nesting": nesting,
    }
    if config.inner is None:
        return {
            **fields,
            "encoder_hid_dim": config.context_dim,
            "encoder_hid_dim_type": "text_proj",
            "masked_cross_attention": config.masked_context,
            "attention_head_dim": config.num_heads,  # the port's name for the number of heads
        }
    return {
        **fields,
        "time_embedding_dim": config.embed_dim,
        "skip_normalization": not config.normalize_input,
        "inner_config": port_config(config.inner, nesting=True),
    }


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def save_model(path: Path, port, config: UNetConfig) -> None:
    model = port_model(port, config)
    shapes = shapes_of(model)
    model.load_state_dict(drawn_weights(shapes))
    torch.manual_seed(0)
    x = [torch.randn(2, 3, 8 * 2**i, 8 * 2**i) for i in reversed(range(len(config.levels)))]
    time, context, mask = torch.tensor([3.0, 700.0]), torch.randn(2, 5, 40), torch.ones(2, 5)
    mask[1, 2:] = 0
    with torch.no_grad():
        y = model(x if len(x) > 1 else x[0], time, context, encoder_attention_mask=mask).sample
    tensors = {"in.time": time, "in.context": context, "in.context_mask": mask}
    for i, (sample, output) in enumerate(zip(x, y if len(x) > 1 else [y], strict=True)):
        tensors[f"in.x{i}"], tensors[f"out.y{i}"] = sample, output.contiguous()
    metadata = {
        "config": json.dumps(config.to_dict()),
        "shapes": json.dumps(shapes, separators=(",", ":")),
        "params": str(sum(parameter.numel() for parameter in model.parameters())),
        "frames_grid": "1",
    }
    save_file(tensors, path, metadata)


def main(source: Path, directory: Path) -> None:
    spec = importlib.util.spec_from_file_location("matryoshka", source)
    port = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = port
    spec.loader.exec_module(port)
    save_model(directory / "port_unet.safetensors", port, INNER)
    save_model(directory / "port_nested3.safetensors", port, OUTER)
    with torch.device("meta"):
        full = {name: shapes_of(port_model(port, model_config(name))) for name in FULL_SIZE}
    (directory / "port_shapes.json").write_text(json.dumps(full, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
