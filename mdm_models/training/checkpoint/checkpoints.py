"""Checkpoints that a crash cannot spoil, written while the training goes on.

RUN/checkpoints/step-00001000/ holds what torch.distributed.checkpoint writes, a .distcp file from each process and
.metadata, and manifest.json with the size and checksum of each. It is written under another name and renamed when all
of it is on the disk, so that a directory of that name is complete; the checksums catch what happens to it later. Any
number of processes can go on from it, whatever number wrote it; one process can read it without a process group.
"""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mdm_models.errors import CheckpointError, one_line
from mdm_models.processes import Processes, Sharing
from mdm_models.storage import sync
from mdm_models.training.checkpoint.files import (
    METADATA,
    Damaged,
    SafeLoadPlanner,
    SafeReader,
    measured,
    read_manifest,
    verified_manifest,
    verify,
    write_manifest,
)
from mdm_models.training.checkpoint.staging import staged

__all__ = ["Checkpoints", "Damaged", "is_finished", "list_steps", "load_averages", "verified_manifest"]

Result = TypeVar("Result")

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says so of a single process


class Checkpoints:
    """The checkpoints of one run. Every method is collective: all processes of the run call it, in the same order.

    identity: which model it is: "name" and whatever its shape follows from, as JSON values; keep: how many are kept.
    record: what is kept with each checkpoint of the data and settings that led to it, as JSON values; compare is called
    with the path of the one from which the run goes on, its record, None if it has none, and ours; it may raise
    CheckpointError. upload: called in the background with each checkpoint that is written, by all processes, and with
    these; it raises nothing that is to end the run. sharing: who sees the same directory `run`: all, unless machines
    have mirrors of their own, each of which then gets what its processes write, and must be whole to go on from.

    The state is a dict of "model", "optimizer", "ema" and "counters": nested dicts and lists of tensors, plain or
    DTensors, and of numbers and strings. Plain tensors are the same on all processes, which share the writing of them.
    While a checkpoint is written, a process keeps a copy of its share in main memory; the disk must hold `keep` + 1.
    """

    def __init__(
        self,
        run: Path,
        identity: dict,
        keep: int,
        processes: Processes,
        record: dict | None = None,
        compare: Callable[[Path, dict | None, dict], object] | None = None,
        upload: Callable[[Path, Processes], object] | None = None,
        sharing: Sharing | None = None,
    ):
        self.run, self.keep = run, keep
        self.record, self.compare, self.upload = json.loads(json.dumps(record)), compare, upload
        self.processes = processes.apart()  # what the thread sends is not mixed up with what a training step sends
        self.sharing = sharing or Sharing.of_all(processes)
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the disk, with lists for tuples
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future | None = None
        self._uploading: Future | None = None
        self._on_disk: int | None = None  # newest step that this process knows to be there, whole

    def save(self, step: int, state: dict) -> None:
        """Copy the state, then write RUN/checkpoints/step-… in the background and delete all but the newest `keep`.

        Waits for the save before it, not for its upload, and raises CheckpointError if that save failed. Does nothing
        if this step was the last one saved or loaded.
        """
        self._finish_saving()
        if step != self._on_disk:
            mine = staged(state, self.processes.rank, self.processes.world_size)
            saving = self._saving = self._thread.submit(self._write, step, mine)
            if self.upload:
                self._uploading = self._thread.submit(self._upload, step, saving)

    @property
    def failed(self) -> bool:
        """Whether the last save has failed, as far as this process knows; then save() and finish() raise, on all."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def finish(self) -> None:
        """Wait until what was saved is on the disk, and its upload is over. Raises CheckpointError, on every process,
        if it cannot be written."""
        self._finish_saving()
        uploading, self._uploading = self._uploading, None
        if uploading is not None:
            uploading.result()

    def _finish_saving(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            self._on_disk = saving.result()

    def load_newest(self, state: dict) -> bool:
        """Continue from the newest checkpoint that is whole: fill the tensors of `state`, replace its other values.

        False if there is none yet. A damaged one is passed over with a warning that names it. Raises CheckpointError if
        all are damaged, and if the checkpoint is of another model.
        """
        steps = self.processes.agree(lambda: [path.name for path in list_steps(self.run)])[0]
        paths = [folder_of(self.run) / name for name in steps]
        newest = _newest_whole(paths, self._verify, warn=self.processes.is_main)
        if newest is None:
            return False
        path, manifest = newest
        _check_identity(path, manifest["model"], self.identity)
        self.processes.agree(lambda: self._compare(path, manifest.get("record")))
        try:
            dcp.load(
                state,
                storage_reader=SafeReader(path),
                planner=SafeLoadPlanner(),
                process_group=self.processes.group,
                no_dist=self.processes.world_size == 1,
            )
        except CheckpointException as error:
            raise CheckpointError(
                f"checkpoint {path}, written with torch {manifest.get('torch')}, does not fit: {_reason(error)}"
            ) from None
        self._on_disk = step_of(path)
        return True

    def _compare(self, path: Path, before: dict | None) -> None:
        if self.compare and self.processes.is_main:  # which alone has the record
            self.compare(path, before, self.record)

    def _verify(self, path: Path) -> dict:
        """`verified_manifest`, each process checking its share of the files of its directory."""
        manifest = self.processes.agree(lambda: read_manifest(path))[0]
        names = self.sharing.share(sorted(manifest["files"]))
        self.processes.agree(lambda: verify(path, {name: manifest["files"][name] for name in names}))
        return manifest

    def _write(self, step: int, state: dict) -> int:
        """Write a checkpoint; in the background. Returns the step."""
        final = folder_of(self.run) / f"step-{step:08d}"
        partial = final.with_name(f".partial-{final.name}")
        try:
            self.processes.agree(lambda: self._make_room(partial))
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(partial, sync_files=False, per_thread_copy_ahead=0),
                process_group=self.processes.group,
                no_dist=self.processes.world_size == 1,
            )
            names = self.processes.agree(lambda: self._written(partial))[0]
            files = [pair for pairs in self.processes.agree(lambda: self._settle(partial, names)) for pair in pairs]
            self.processes.agree(lambda: self._seal(partial, final, dict(files)))
        except (Exception, CheckpointException) as error:
            if self.sharing.keeps:
                shutil.rmtree(partial, ignore_errors=True)
            saved = list_steps(self.run)
            last = f"the last one saved is {saved[-1]}" if saved else "none was saved before"
            raise CheckpointError(f"checkpoint {final} cannot be written ({_reason(error)}); {last}") from None
        return step

    def _upload(self, step: int, saving: Future) -> None:
        """In the background, behind the writing, whose copy of the state is free by then."""
        if self.upload is not None and saving.exception() is None:
            self.upload(folder_of(self.run) / f"step-{step:08d}", self.processes)

    def _make_room(self, partial: Path) -> None:
        """An empty folder, and no leftovers of a process that was killed while it saved or deleted."""
        if self.sharing.keeps:
            for leftover in partial.parent.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

    def _written(self, partial: Path) -> list[str]:
        """The files that all processes have written; the leading one knows."""
        return sorted({*SafeReader(partial).data_files(), METADATA}) if self.processes.is_main else []

    def _settle(self, partial: Path, names: list[str]) -> list[tuple[str, tuple[int, int]]]:
        """Have on the disk those of the files that this process has written; → their names, sizes and checksums."""
        own = [name for name in names if name.startswith(f"__{self.processes.rank}_")]
        own += [METADATA] * self.processes.is_main
        for name in own:
            sync(partial / name)
        return [(name, measured(partial / name)) for name in own]

    def _seal(self, partial: Path, final: Path, files: dict[str, tuple[int, int]]) -> None:
        """Make a written checkpoint the newest, and delete the oldest."""
        if self.processes.is_main:
            write_manifest(partial, self.identity, files, self.record)
        if not self.sharing.keeps:
            return
        if final.exists():  # a damaged one that was passed over when the run resumed
            delete(final)
        partial.rename(final)
        sync(final.parent)
        # those of later steps were passed over when the run resumed
        earlier = [path for path in list_steps(self.run) if step_of(path) <= step_of(final)]
        for old in earlier[: -self.keep]:
            with contextlib.suppress(OSError):  # the user may have been quicker; what was asked for is saved
                delete(old)


def list_steps(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    paths = folder_of(run).glob("step-*")
    return sorted((path for path in paths if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def is_finished(run: Path, steps: int) -> bool:
    """Whether a run has a checkpoint of its last step or a later one."""
    return any(step_of(path) >= steps for path in list_steps(run))


def load_averages(run: Path) -> dict[str, Tensor]:
    """Load the averaged weights of a run's newest checkpoint that is whole, on the CPU, read by this process alone.

    Raises CheckpointError if there is none.
    """
    newest = _newest_whole(list_steps(run), verified_manifest, warn=True)
    if newest is None:
        raise CheckpointError(f"there is no checkpoint in {run}")
    reader = SafeReader(newest[0])
    described = reader.metadata.state_dict_metadata
    averages = {
        name.removeprefix("ema."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if name.startswith("ema.")
    }
    try:
        planner = SafeLoadPlanner(allow_partial_load=True)
        dcp.load({"ema": averages}, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {newest[0]} cannot be read: {_reason(error)}") from None
    return averages


def _newest_whole(paths: list[Path], verify_one: Callable[[Path], dict], warn: bool) -> tuple[Path, dict] | None:
    """The last of these checkpoints that is not damaged, with its manifest; None if there are none to choose from."""
    for path in reversed(paths):
        try:
            return path, verify_one(path)
        except Damaged as error:
            if warn:
                warnings.warn(f"checkpoint {path} is damaged: {error}; trying the one before it", stacklevel=3)
    if paths:
        raise CheckpointError(f"every checkpoint in {paths[0].parent} is damaged; move them away to start over")
    return None


def _check_identity(path: Path, saved: dict, ours: dict) -> None:
    """Raise CheckpointError unless the checkpoint's model is ours, whatever it is called."""
    there, here = _flat(saved), _flat(ours)
    for key in sorted(there.keys() | here.keys()):
        if key != "name" and there.get(key) != here.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of the model {saved.get('name')}, this run trains {ours.get('name')}: {key} is "
                f"{there.get(key)} there, {here.get(key)} here; choose another output directory"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one: {"unet": {"inner": {"channels": …}}} → {"unet.inner.channels": …}."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def delete(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted does not have a checkpoint's name."""
    doomed = path.rename(path.with_name(f".partial-deleted-{path.name}"))
    shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Why torch.distributed.checkpoint failed, in one line: the error of the first process that had one."""
    if isinstance(error, CheckpointException):
        error, _ = error.failures[min(error.failures)]
    behind: BaseException | None = error
    while behind is not None:  # torch's own file, closed on a full disk, says nothing of it
        if isinstance(behind, OSError):
            return one_line(behind)
        behind = behind.__context__
    return one_line(error)
