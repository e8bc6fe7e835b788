"""Weights from files → a model: do they fit, and without having both in memory."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mdm_models.config import UNetConfig
from mdm_models.errors import one_line
from mdm_models.shipped import shipped_or
from mdm_models.storage import CONFIG_FILE, WEIGHTS_FILE, check_local, mapped, opened, read_config
from mdm_models.unet import UNet, empty_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a model computes in


def from_pretrained(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> UNet:
    """Load the model that its `save_pretrained` wrote, in evaluation mode.

    source: a directory, or that of a training run; or a name of `list_models(pretrained=True)`; or "owner/name", a
    repository of the Hugging Face Hub with the same two files, which are downloaded unless they were before (this needs
    the package huggingface_hub).
    dtype: of the weights; None: that of the file.

    Memory holds the model and a few tensors of the file, never all of both. Raises FileNotFoundError if there is no
    such model; ValueError or TypeError, in one line, if a file is damaged or does not fit the other.
    """
    directory = directory_of(source)
    config = read_config(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    with opened(path) as file:
        found = mapped(file, file.keys())
        model = fitting_model(config, found, path, dtype)
    del found  # no byte of it was read
    own, weights = model.state_dict(), {}
    keys = list(own)
    for start in range(0, len(keys), 32):
        with opened(path) as file:  # mapped anew, which gives back the pages of the tensors before
            for key, tensor in mapped(file, keys[start : start + 32]).items():
                weights[key] = placed(tensor, own[key], dtype, device, copy=True)
    return with_weights(model, weights)


def fitting_model(
    config: UNetConfig, tensors: Mapping[str, Tensor], source: str | Path, dtype: torch.dtype | None = None
) -> UNet:
    """Make the config's model, without memory, if these tensors can be its weights. `source` is what errors call them.

    Raises ValueError in one line that names the first tensor that is missing, unknown or of another shape, or if the
    weights are in no dtype that a model computes in; TypeError if `dtype`, which they are to be converted to, is none.
    """
    blocks = sum(sum(level.blocks) + sum(level.attention) + level.context_layers for level in config.levels)
    if blocks > len(tensors):  # before a damaged config has us make a million layers
        raise ValueError(f"{source} holds {len(tensors)} tensors, too few for the {blocks} blocks of the model")
    model = empty_model(config)
    own = model.state_dict()
    if missing := own.keys() - tensors.keys():
        raise ValueError(f"{source} is of another model: it lacks {len(missing)} tensors, as {min(missing)}")
    if unknown := tensors.keys() - own.keys():
        raise ValueError(f"{source} is of another model: it has {len(unknown)} tensors too many, as {min(unknown)!r}")
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)}; the model's is {tuple(tensor.shape)}"
            raise ValueError(f"{source} is of another model: {key} has shape {shapes}")
    _check_dtypes({tensor.dtype for tensor in tensors.values()}, source, dtype)
    return model


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str], source: str | Path) -> dict[str, Tensor]:
    """Give tensors the names that `rename` makes of theirs. `source` is what errors call them.

    Raises ValueError in one line for two that would have the same name, of which one would be lost.
    """
    names: dict[str, str] = {}
    for old in tensors:
        new = rename(old)
        if new in names:
            raise ValueError(f"{source} has two tensors for the model's {new}, {names[new]} and {old}; leave one out")
        names[new] = old
    return {new: tensors[old] for new, old in names.items()}


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError in one line, where errors call the tensors `source`, if a number among them is infinite or
    NaN."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source} holds infinities or NaN, as in {name}: a training that diverged leaves such")


def placed(
    tensor: Tensor, own: Tensor, dtype: torch.dtype | None, device: str | torch.device, copy: bool = False
) -> Tensor:
    """Give a weight in the memory format of the model's `own` tensor, in `dtype` (None: as it is), on `device`."""
    channels_last = own.dim() == 4 and own.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.to(device=device, dtype=dtype, memory_format=memory_format, copy=copy)


def with_weights(model: UNet, weights: dict[str, Tensor]) -> UNet:
    """Give a model without memory these very tensors as its weights, and return it in evaluation mode."""
    model.load_state_dict(weights, assign=True)
    return model.to(model.conv_in.weight.device).eval()  # the buffers follow the weights


def directory_of(source: str | Path, *more: str) -> Path:
    """Find where a model's files are on this machine: in the directory of this name or, of a training run, in the one
    that it left in it; or those that come along; or downloaded from the Hub, with files of these names as `more`.

    Raises FileNotFoundError, or ValueError for a file.
    """
    path = shipped_or(source)
    if path.is_dir():
        left = path / "model"
        if (path / WEIGHTS_FILE).is_file() or not (left.is_dir() or (path / "checkpoints").is_dir()):
            return path
        if not (left / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"{path} is a run that has left no model yet; it does when it ends or is stopped")
        return left
    if path.exists():
        raise ValueError(f"{source} is a file; name the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    check_local(source)
    if not is_repository(source):
        raise FileNotFoundError(f"{source}: no such directory, and no model of that name comes with this package")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, *more]))
    except Exception as error:  # of the network, the Hub, its client: a long and changing list
        raise FileNotFoundError(
            f"{source}: no such directory, and it cannot be had from the Hugging Face Hub: {one_line(error)}"
        ) from error


def is_repository(source: str | Path) -> bool:
    """Whether that may be the name of a repository of the Hub, "owner/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


def _check_dtypes(found: set[torch.dtype], source: str | Path, dtype: torch.dtype | None) -> None:
    names = ", ".join(sorted(map(str, found)))
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype!r}; it must be one of {', '.join(map(str, DTYPES))}")
    if not all(each.is_floating_point for each in found):
        raise ValueError(f"{source} has weights of type {names}; they must be floating-point numbers")
    if dtype is None and (len(found) > 1 or not found <= set(DTYPES)):
        known = ", ".join(map(str, DTYPES))
        remedy = f"save all in one of {known}, or choose one to compute in with the argument dtype"
        raise ValueError(f"{source} has weights of type {names}; {remedy}")
