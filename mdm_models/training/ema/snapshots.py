"""Snapshots of power-function averages, kept through a run, and averages of other widths made from them afterwards.

RUN/averages/step-00005000.safetensors holds the averages of every width that the run tracks, each under "STD/NAME", in
float16: as Karras et al. (arXiv 2312.02696, section 3.2) keep theirs, eight times finer than bfloat16 in as many bytes.
"""

import functools
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mdm_models.errors import CheckpointError, one_line
from mdm_models.processes import Processes
from mdm_models.storage import opened, write_whole
from mdm_models.training.ema.averages import PowerEMA
from mdm_models.training.ema.power_functions import Combination, Profile, combine

DTYPE = torch.float16
METADATA = "power_averages"
ROUNDING = 2.0**-11  # largest relative error of a rounded number


@dataclass(frozen=True)
class Snapshot:
    """A file of averages, as it was after so many updates."""

    path: Path
    stds: tuple[float, ...]
    updates: int


def write_snapshot(run: Path, step: int, averages: PowerEMA, processes: Processes) -> None:
    """Write RUN/averages/step-…, by the leading process; every process must call this, as each may hold a part.

    Raises CheckpointError, on every process, if it cannot be written; the earlier ones are untouched then.
    """
    rounded = {}
    for std, by_name in averages.by_std.items():
        for name, average in by_name.items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if processes.is_main:
                rounded[f"{std:g}/{name}"] = whole.to(device="cpu", dtype=DTYPE).contiguous()
    metadata = {METADATA: json.dumps({"stds": averages.stds, "updates": averages.updates})}
    path = _folder(run) / f"step-{step:08d}.safetensors"
    processes.agree(lambda: _write(path, rounded, metadata) if processes.is_main else None)


def _write(path: Path, rounded: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda partial: save_file(rounded, partial, metadata))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"averages {path} cannot be written: {one_line(error)}") from None


def forget_snapshots_after(run: Path, step: int) -> None:
    """Delete the snapshots of later steps, of a run that died and goes on from `step`: it will write them again."""
    for path in _paths(run):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


def list_snapshots(run: Path) -> list[Snapshot]:
    """List the snapshots of a run, oldest first. Raises CheckpointError for a damaged one."""
    return [_read(path) for path in _paths(run)]


def reconstruct(run: Path, std: float) -> tuple[dict[str, Tensor], Combination]:
    """Make the average of width `std` at a run's last snapshot; → it, float32 on the CPU by name, and how it was made.

    Memory holds one set of weights, whatever the number of snapshots. Raises CheckpointError if the run has no
    snapshots, ValueError if no average has that width.
    """
    snapshots = list_snapshots(run)
    if not snapshots:
        raise CheckpointError(f"there are no averages in {_folder(run)}: train with --ema-stds 0.05 0.1")
    kept = [(snapshot, width) for snapshot in snapshots for width in snapshot.stds]
    profiles = [Profile(width, snapshot.updates) for snapshot, width in kept]
    combination = combine(profiles, Profile(std, snapshots[-1].updates))
    with ExitStack() as stack:
        files = {snapshot.path: stack.enter_context(opened(snapshot.path)) for snapshot in snapshots}
        sources = [(files[snapshot.path], f"{width:g}/") for snapshot, width in kept]
        names = _names(files[snapshots[-1].path])
        try:
            return {name: _combined(combination.weights, sources, name) for name in names}, combination
        except SafetensorError as error:
            raise CheckpointError(f"the averages in {_folder(run)} are of several models: {one_line(error)}") from None


def _combined(weights: np.ndarray, sources: list[tuple[safe_open, str]], name: str) -> Tensor:
    kept = (file.get_tensor(prefix + name).double() for file, prefix in sources)
    return functools.reduce(torch.add, (float(w) * average for w, average in zip(weights, kept, strict=True))).float()


def _names(file: safe_open) -> list[str]:
    """The parameters in a snapshot, once each."""
    keys = file.keys()
    return list(dict.fromkeys(key.split("/", 1)[1] for key in keys))


def _read(path: Path) -> Snapshot:
    try:
        with opened(path) as file:
            metadata = json.loads(file.metadata()[METADATA])
        return Snapshot(path, tuple(metadata["stds"]), metadata["updates"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"averages {path} are damaged: {one_line(error)}; delete the file") from None


def _paths(run: Path) -> list[Path]:
    paths = _folder(run).glob("step-*.safetensors")
    return sorted(path for path in paths if re.fullmatch(r"step-\d{8,}", path.stem))


def _folder(run: Path) -> Path:
    return run / "averages"
