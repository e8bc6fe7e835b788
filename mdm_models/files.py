"""Files that a crash cannot spoil, and errors in one line."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    """Put what `write_to` writes in the place of `path`: all of it, on the disk, or nothing.

    Raises what `write_to` raises; `path` is as it was then.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")  # beside it: a rename stays in one file system
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write_to(partial)
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: Exception) -> str:
    """An error's message without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
