"""Copies of shards that are not on a local disk, shared by all processes of a machine and by one run after another.

A shard is copied whole when it is first needed; a copy is there whole or not at all. When the copies pass the limit,
those that were opened longest ago are removed, but never one that a process has open: if the copies in use are larger
than the limit, so is the cache. While shards are dealt to lanes (see `order.py`), a lane needs the room of two windows.
Each copy has a small file of where its samples lie beside it, which stays when the copy goes. What a command (pipe:…)
writes is taken never to change; if it does, remove the cache folder.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from mdm_models.data.locations import UnreachableError, download, patiently, store_of
from mdm_models.errors import DataError
from mdm_models.storage import check_local, naming, write_whole

ABANDONED = 3600  # seconds after which half a copy is not one that is being written


@dataclass(frozen=True)
class ShardCache:
    """Keeps copies of shards in one folder, `limit` bytes of them together unless those in use are larger."""

    folder: Path
    limit: float

    @classmethod
    def of(cls, folder: str, gigabytes: float) -> "ShardCache":
        """Make a cache of so many 10⁹ bytes in `folder`, "" for mdm_models/shards in the user's cache directory. Raises
        ValueError for a URL."""
        check_local(folder, "--cache")
        return cls(Path(folder) if folder else user_cache() / "shards", gigabytes * 1e9)

    def prepare(self) -> None:
        """Make the folder. Raises DataError if that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cache: the folder {self.folder} cannot be made: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise DataError(f"cache: the folder {self.folder} cannot be written to; choose another --cache")

    def open(self, name: str, size: int | None, version: str, waits: Sequence[float] | None = None) -> BinaryIO:
        """Open the copy of a shard, made first if need be; it is in use until the file is closed.

        size: in bytes, if known; waits: as for `patiently`. Raises UnreachableError.
        """
        path = self._path(name, version)
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self.fetch(name, size, version, waits)
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:
                os.utime(file.fileno())
                return file
            file.close()  # it was removed between opening and locking

    def fetch(self, name: str, size: int | None, version: str, waits: Sequence[float] | None = None) -> None:
        """Have a copy of the shard in the folder. Raises UnreachableError after a few attempts."""
        path = self._path(name, version)
        with FileLock(f"{path}.lock"):  # several processes may want it at once: one copies, the others wait
            if path.exists():
                return
            partial = path.with_name(f"{path.name}.partial")
            try:
                with naming(partial):
                    patiently(lambda: self._copy(name, size, partial), store_of(name), waits)
                partial.replace(path)
            except FileNotFoundError:
                raise UnreachableError("it is not there any more") from None
            finally:
                partial.unlink(missing_ok=True)

    def _copy(self, name: str, size: int | None, target: Path) -> None:
        self._make_room(size or 0)
        download(name, target)
        arrived = target.stat().st_size
        if size is not None and arrived != size:
            raise OSError(f"{arrived} of {size} bytes arrived")

    def _make_room(self, size: int) -> None:
        """Remove the copies that were opened longest ago until `size` more bytes fit."""
        for partial in self.folder.glob("*.tar.partial"):
            if time.time() - _stat(partial)[0] > ABANDONED:
                partial.unlink(missing_ok=True)
        copies = sorted((*_stat(path), path) for path in self.folder.glob("*.tar"))
        used = sum(length for _, length, _ in copies)
        for _, length, path in copies:
            if used + size <= self.limit:
                return
            if _remove_unused(path):
                used -= length

    def recall(self, name: str, version: str) -> bytes | None:
        """Give what `remember` was given for this version of the shard; None if that was nothing."""
        try:
            return self._path(name, version).with_suffix(".index").read_bytes()
        except FileNotFoundError:
            return None

    def remember(self, name: str, version: str, index: bytes) -> None:
        """Keep where the samples of this version of the shard lie, in the bytes of `shard_index.to_bytes`."""
        write_whole(self._path(name, version).with_suffix(".index"), lambda path: path.write_bytes(index))

    def note(self, name: str, size: int | None, version: str) -> None:
        """Keep what the store says of a shard, its size in bytes and its version, for `last_seen`."""
        told = json.dumps([size, version])
        path = self._path(name, "").with_suffix(".seen")
        if not path.exists() or path.read_text() != told:
            write_whole(path, lambda partial: partial.write_text(told))

    def last_seen(self, name: str) -> tuple[int | None, str] | None:
        """Size and version of the shard as the store last said, if there is a copy of that; else None."""
        try:
            size, version = json.loads(self._path(name, "").with_suffix(".seen").read_text())
        except (OSError, ValueError, TypeError):
            return None
        return (size, version) if self._path(name, version).exists() else None

    def _path(self, name: str, version: str) -> Path:
        return self.folder / f"{cache_name(name, version)}.tar"


def user_cache() -> Path:
    """This package's folder in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdm_models"


def cache_name(name: str, version: str = "") -> str:
    """What a copy of that file or folder is called, readable and like no other."""
    digest = hashlib.blake2b(f"{name}\n{version}".encode(), digest_size=8).hexdigest()
    readable = re.sub(r"[^\w-]+", "_", Path(name).stem)[-64:]
    return f"{readable}-{digest}"


def _stat(path: Path) -> tuple[float, int]:
    """When a file was last opened through the cache, in seconds, and its bytes; now and 0 if it has gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return time.time(), 0
    return found.st_mtime, found.st_size


def _remove_unused(path: Path) -> bool:
    """Remove a copy unless a process has it open; whether it is gone."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
