"""Convert a checkpoint to a directory for `from_pretrained` and `mdm sample`.

  mdm convert vis_model_256x256.pth mdm_t2i_256        an official checkpoint (with or without EMA)
  mdm convert PORT/unet/nesting_level_1 mdm_t2i_256    a folder of the port to diffusers

The directory gets config.json, model.safetensors and pipeline.json. No code in the checkpoint is run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor
from tyro.conf import Positional, arg

from mdm_models.commands.line import command
from mdm_models.config import UNetConfig
from mdm_models.diffusers_port import read_port, state_dict_from_port
from mdm_models.official import named_config, read_checkpoint, state_dict_from_official
from mdm_models.pipeline import PipelineConfig
from mdm_models.pretrained import check_finite, fitting_model
from mdm_models.storage import CONFIG_FILE, WEIGHTS_FILE, together, write_model
from mdm_models.unet import empty_model
from mdm_models.zoo import list_models, model_config

SIZE = 32  # of a named model whose name does not tell it
FOR_A_CPU = ("mdm_t2i_tiny", "mdm_t2v_tiny", "mdm_t2i_emoji", "mdm_t2v_emoji")


def convert(source: Path, directory: Path, name: str | None = None, overwrite: bool = False) -> str:
    """Convert a .pth file or a folder of the diffusers port; → the model's name, found by its tensors if not given.

    Tells its progress on the standard output. Raises FileNotFoundError, OSError or ValueError in one line: see
    `official.read_checkpoint`, `diffusers_port.read_port`, `pretrained.fitting_model` and `storage.write_model`.
    """
    if not overwrite and any((directory / file).exists() for file in (CONFIG_FILE, WEIGHTS_FILE)):
        raise ValueError(f"{directory} holds a model already; choose another directory, or pass --force to replace it")
    print(f"reading {source}", flush=True)
    if source.is_dir():
        weights = state_dict_from_port(read_port(source), source)
    else:
        weights = state_dict_from_official(read_checkpoint(source), source)
    name = name or _recognised(weights, source)
    config = named_config(name)
    fitting_model(config, weights, source)
    check_finite(weights, source)
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"writing {name}, {parameters:,} parameters, to {directory}", flush=True)
    with together():
        write_model(directory, config, weights, overwrite)
        _sampling(name, config).save(directory)
    return name


def _sampling(name: str, config: UNetConfig) -> PipelineConfig:
    """How the official models are sampled: at the size that they take for granted, with a guidance of 7.5; at 1024² the
    noise is shifted by the square of the resolution ratio."""
    ending = name.rpartition("_")[2]
    size = int(dict(config.micro).get("scale") or (ending if ending.isdecimal() else SIZE))
    shift_power = 2.0 if size == 1024 else 1.0
    return PipelineConfig(
        size=size, text_encoder=_text_encoder(name, config), shift_power=shift_power, guidance_scale=7.5
    )


def _text_encoder(name: str, config: UNetConfig) -> str:
    """What the model reads: class numbers or flan-t5-xl; "" for the models for a CPU, whose encoder is trained along,
    and in no such checkpoint, so that whoever samples has to give one."""
    if "_c2i_" in name:
        return f"classes:{config.innermost.context_dim}"
    return "" if name.startswith(FOR_A_CPU) else "google/flan-t5-xl"


def _recognised(weights: dict[str, Tensor], source: Path) -> str:
    """The named model that has these tensors. ValueError, which names the nearest one, if there is none."""
    shapes = {(key, tensor.shape) for key, tensor in weights.items()}
    differing = {name: shapes ^ _shapes(model_config(name)) for name in list_models()}
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        raise ValueError(
            f"{source} is none of the models that mdm_models names; the nearest is {nearest}, from which "
            f"{len(differing[nearest])} names or shapes of tensors differ, as {min(differing[nearest])[0]}"
        )
    return nearest


def _shapes(config: UNetConfig) -> set:
    return {(key, tensor.shape) for key, tensor in empty_model(config).state_dict().items()}


@dataclass(frozen=True)
class Options:
    source: Annotated[Positional[Path], arg(metavar="IN")]
    """a .pth file, or a folder nesting_level_N of the port"""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """directory for the converted model"""
    model: str | None = None
    """the name of the model that it is; default: found by its tensors"""
    force: bool = False
    """replace another model in OUT"""


def run(options: Options) -> None:
    """Convert, and print how the model is opened. Raises FileNotFoundError, OSError or ValueError in one line."""
    convert(options.source, options.out, options.model, options.force)
    print(f'done: mdm_models.from_pretrained("{options.out}")')


main = command("convert", __doc__, Options, run)
