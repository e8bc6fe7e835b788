"""One checkpoint on the disk: the files of torch.distributed.checkpoint, and manifest.json, which says what they are.

A checkpoint from elsewhere can be read without trusting it. PyTorch's own reader unpickles `.metadata` and every value
that is not a tensor, and a pickle may call any function; here `.metadata` may name only the classes that describe
tensors, and the values go through torch.load's weights_only, as PyTorch has the tensors do.
"""

import dataclasses
import enum
import importlib
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata, ReadItem

from mdm_models.errors import CheckpointError, one_line
from mdm_models.private_torch import CHECKPOINT_CLASSES
from mdm_models.storage import sync

MANIFEST = "manifest.json"
METADATA = ".metadata"  # where torch.distributed.checkpoint notes which tensor lies where

Files = Mapping[str, tuple[int, int]]
"""name → size in bytes, CRC-32"""


class Damaged(CheckpointError):
    """A checkpoint whose files are not what was written."""


def measured(path: Path) -> tuple[int, int]:
    """Find a file's size in bytes and its CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return size, checksum


def write_manifest(folder: Path, identity: dict, files: Files, record: dict | None = None) -> None:
    """Write down which model it is, what led to it and what its files must be."""
    content = {"model": identity, "torch": torch.__version__, "files": dict(files)}
    if record is not None:
        content["record"] = record
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(path: Path) -> dict:
    """Read the manifest of a checkpoint: "model", its identity, "torch", the version that wrote it, and "files".

    Raises Damaged, or CheckpointError if an earlier version of this package wrote the checkpoint.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {name: (int(size), int(checksum)) for name, (size, checksum) in manifest["files"].items()}
        identity = {**manifest["model"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST}: {one_line(error)}") from None
    if METADATA not in files:
        raise CheckpointError(
            f"checkpoint {path} was written by an earlier version of mdm_models; finish its run with that version, or "
            "choose another output directory"
        )
    return {**manifest, "model": identity, "files": files}


def verify(path: Path, files: Files) -> None:
    """Check files of a checkpoint by size and CRC-32. Raises Damaged if one is not what was written."""
    for name, (size, checksum) in files.items():
        try:
            size_here = (path / name).stat().st_size  # told before all of the file is read
            checksum_here = measured(path / name)[1] if size_here == size else None
        except OSError as error:
            raise Damaged(one_line(error)) from None
        if size_here != size:
            raise Damaged(f"{name} has {size_here} bytes, not {size}")
        if checksum_here != checksum:
            raise Damaged(f"{name} has another checksum")


def verified_manifest(path: Path) -> dict:
    """Read the manifest of a checkpoint and check that its files have the sizes and checksums it states. Raises
    Damaged."""
    manifest = read_manifest(path)
    verify(path, manifest["files"])
    return manifest


class SafeReader(FileSystemReader):
    """Reads a checkpoint's tensors; raises CheckpointError if its metadata is more than a description of tensors in
    files beside it."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            with (path / METADATA).open("rb") as file:
                self.metadata = _MetadataUnpickler(file).load()
            if stray := sorted(name for name in self.data_files() if Path(name).name != name):
                raise pickle.UnpicklingError(f"it points to {stray[0]}, outside the checkpoint")
        except (OSError, pickle.UnpicklingError, AttributeError, EOFError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path / METADATA} cannot be read: {one_line(error)}") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def data_files(self) -> set[str]:
        """Names of the files that hold the tensors."""
        return {info.relative_path for info in self.metadata.storage_data.values()}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what a checkpoint's metadata consists of, and nothing else: the dataclasses and enums by which torch
    describes tensors in files, whichever its version has, sizes, dtypes and paths."""

    DESCRIPTIONS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    PATHS = ("pathlib", "pathlib._local")  # the latter of Python 3.13

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and self._is_harmless(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it calls for {module}.{name}, which describes no tensor")

    def _is_harmless(self, module: str, name: str) -> bool:
        if module == "torch":
            return name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        if module in self.PATHS:
            return name in ("Path", "PosixPath", "PurePosixPath")
        if name in CHECKPOINT_CLASSES.get(module, ()):
            return True
        found = getattr(importlib.import_module(module), name, None) if module in self.DESCRIPTIONS else None
        describes = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
        return describes and found.__module__ == module


class SafeLoadPlanner(DefaultLoadPlanner):
    """Fills tensors in place, and replaces other values by numbers, strings and containers of these.

    allow_partial_load: take of the checkpoint what is asked for; otherwise the two must have the same entries.
    """

    def create_local_plan(self) -> LoadPlan:
        there = self.metadata.state_dict_metadata if self.metadata else {}
        differing = sorted(self.state_dict.keys() ^ there.keys())
        if differing and not self.allow_partial_load:
            raise ValueError(f"{differing[0]} and {len(differing) - 1} other entries are in one but not in the other")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        harmless = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)  # which unpickles anything
