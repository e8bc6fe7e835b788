"""A folder in an object store: s3://…, gs://…, hf://…, whatever fsspec opens; also file://…, for a bucket that is
mounted. Credentials come from where the package for that protocol looks for them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from mdm_models.data.locations import UnreachableError, file_system, patiently, store_of
from mdm_models.errors import TrainingError, one_line

Result = TypeVar("Result")


class StoreError(TrainingError):
    """A store cannot be used; the message names the URL."""


class Store:
    """The files of the folder of this URL, by their names inside it: "a/b.txt".

    What fails is tried again after 1, 4 and 16 seconds; then, or at once where that is of no use, StoreError is raised.
    A file that is being written is seen whole or not at all, in those stores that are made so: S3 is.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def check(self) -> None:
        """Check the URL without asking anybody. Raises StoreError for a protocol that is unknown or whose package is
        not installed."""
        try:
            fsspec.get_filesystem_class(urlsplit(self.url).scheme)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{self.url} cannot be opened: {one_line(error)}") from None

    def names(self, folder: str = "") -> list[str]:
        """List the names of the files in `folder` and in its folders, sorted; "" for all that the store has."""

        def find(system: fsspec.AbstractFileSystem, path: str) -> list[str]:
            system.invalidate_cache()  # another machine may have written
            try:
                return list(system.find(f"{path}/{folder}".rstrip("/")))
            except FileNotFoundError:
                return []

        root = self._ask("opened", lambda _, path: path) + "/"
        return sorted(path.removeprefix(root) for path in self._ask("listed", find))

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if there is none."""

        def cat(system: Any, path: str) -> bytes | None:
            try:
                return system.cat_file(f"{path}/{name}")
            except FileNotFoundError:
                return None

        return self._ask("read", cat)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._ask("written to", lambda system, path: system.pipe_file(f"{path}/{name}", data))

    def put(self, file: Path, name: str) -> None:
        """Copy the local `file` to the store."""
        self._ask("written to", lambda system, path: system.put_file(str(file), f"{path}/{name}"))

    def get(self, name: str, file: Path) -> None:
        """Copy a file of the store to the local `file`."""
        self._ask("read", lambda system, path: system.get_file(f"{path}/{name}", str(file)))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files in this order; those that are not there are passed over."""

        def remove(system: fsspec.AbstractFileSystem, path: str) -> None:
            for name in names:
                if system.exists(f"{path}/{name}"):
                    system.rm_file(f"{path}/{name}")

        self._ask("written to", remove)

    def _ask(self, what: str, act: Callable[[fsspec.AbstractFileSystem, str], Result]) -> Result:
        options = {"auto_mkdir": True} if urlsplit(self.url).scheme in ("file", "local") else {}
        try:
            system, path = file_system(self.url, **options)
            return patiently(lambda: act(system, path.rstrip("/")), store_of(self.url))
        except (UnreachableError, OSError) as error:
            raise StoreError(f"{self.url} cannot be {what}: {one_line(error)}") from None
