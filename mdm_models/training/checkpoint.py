"""Checkpoints that a crash cannot spoil.

RUN/checkpoints/step-00001000/ holds model.safetensors, ema.safetensors, optimizer.pt, counters.json and, with the size
and checksum of each, manifest.json. It is written under another name and renamed when all of it is on the disk, so that
a directory of that name is complete; the checksums catch what happens to it later.
"""

import json
import pickle
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdm_models.files import one_line, sync
from mdm_models.training.errors import CheckpointError

MANIFEST = "manifest.json"


class Damaged(CheckpointError):
    """A checkpoint whose files are not what was written."""


@dataclass
class Checkpoint:
    """What a run needs to go on: weights and averages by parameter name, the optimizer's state dict, and plain numbers
    (`counters`: "step", "samples_seen", …)."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict
    counters: dict[str, int]


def save(run: Path, checkpoint: Checkpoint, identity: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-…, then delete all but the newest `keep`. For one process of a run only.

    identity: which model it is: "name" and whatever its shape follows from, as JSON values. Raises CheckpointError if
    the checkpoint cannot be written; the earlier ones are untouched then.
    """
    folder = run / "checkpoints"
    step = checkpoint.counters["step"]
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    try:
        for leftover in folder.glob(".partial-*"):  # of a process that was killed while it saved
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        _write(partial, checkpoint, identity)
        if final.exists():  # a damaged one that was passed over when the run resumed
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last two wrap a full disk
        shutil.rmtree(partial, ignore_errors=True)
        saved = list_steps(run)
        last = f"the last one saved is {saved[-1]}" if saved else "none was saved before"
        raise CheckpointError(f"checkpoint {final} cannot be written ({one_line(error)}); {last}") from None
    for old in list_steps(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_steps(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def load_newest(run: Path, identity: dict) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, on the CPU; None if there is none yet.

    A damaged one is passed over with a warning that names it. Raises CheckpointError if all are damaged, and if the
    checkpoint is of another model than `identity`.
    """
    paths = list_steps(run)
    for path in reversed(paths):
        try:
            return load(path, identity)
        except Damaged as error:
            warnings.warn(f"checkpoint {path} is damaged: {error}; trying the one before it", stacklevel=2)
    if paths:
        raise CheckpointError(f"every checkpoint in {run / 'checkpoints'} is damaged; move them away to start over")
    return None


def load_averages(run: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's newest checkpoint, on the CPU. Raises CheckpointError if it has none."""
    paths = list_steps(run)
    if not paths:
        raise CheckpointError(f"there is no checkpoint in {run}")
    verified_manifest(paths[-1])
    return load_file(paths[-1] / "ema.safetensors")


def load(path: Path, identity: dict) -> Checkpoint:
    """One checkpoint, on the CPU. Raises Damaged, or CheckpointError if it is of another model than `identity`."""
    saved = verified_manifest(path)["model"]
    there, here = _flat(saved), _flat(json.loads(json.dumps(identity)))
    for key in sorted(there.keys() | here.keys()):
        if key != "name" and there.get(key) != here.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of the model {saved['name']}, this run trains {identity['name']}: {key} is "
                f"{there.get(key)} there, {here.get(key)} here; choose another output directory"
            )
    try:
        return Checkpoint(
            model=load_file(path / "model.safetensors"),
            ema=load_file(path / "ema.safetensors"),
            optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            counters=json.loads((path / "counters.json").read_text()),
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise Damaged(one_line(error)) from None


def verified_manifest(path: Path) -> dict:
    """The manifest of a checkpoint whose files have the sizes and checksums it states. Raises Damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, (size, checksum) in manifest["files"].items():
            if (path / name).stat().st_size != size:
                raise Damaged(f"{name} has {(path / name).stat().st_size} bytes, not {size}")
            if _checksum(path / name) != checksum:
                raise Damaged(f"{name} has another checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(one_line(error)) from None
    return manifest


def _write(folder: Path, checkpoint: Checkpoint, identity: dict) -> None:
    save_file(_plain(checkpoint.model), folder / "model.safetensors")
    save_file(_plain(checkpoint.ema), folder / "ema.safetensors")
    torch.save(checkpoint.optimizer, folder / "optimizer.pt")
    (folder / "counters.json").write_text(json.dumps(checkpoint.counters))
    files = {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"model": identity, "files": files}, indent=1))
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors stores row-major memory only."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one: {"unet": {"inner": {"channels": …}}} → {"unet.inner.channels": …}."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
