"""Files that a crash cannot spoil, and models in them: DIRECTORY/config.json says what a model is,
DIRECTORY/model.safetensors holds its weights.

Neither file can run code when it is read. A file is written beside its place, flushed to the disk and renamed, so that
what was there stays whole until what replaces it is.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdm_models.config import UNetConfig
from mdm_models.errors import one_line

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
SETTINGS_FILE = "settings.json"
FORMAT_VERSION = 1  # of config.json
_blocks = threading.local()
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # Path makes one slash of two


def url_of(path: str | Path) -> str:
    """Give the URL that a path is, of which Path has made "s3:/bucket"; "" for one of a disk."""
    found = URL.match(str(path))
    slashes = ":///" if found and found[1] == "file" else "://"
    return f"{found[1]}{slashes}{str(path)[found.end() :]}" if found else ""


def check_local(path: str | Path, name: str = "") -> None:
    """Raises ValueError for a URL where a path on a local disk is needed, under which a folder "s3:" would be made.

    name: of the option that gave it.
    """
    if url := url_of(path):
        raise ValueError(f"{name} {url} is a URL; give a path on a local disk, mounted or copied from there".strip())


def write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    """Put what `write_to` writes in the place of `path`: all of it, on the disk, or nothing.

    Raises what `write_to` raises, with the path if the system does not name it; `path` is as it was then.
    """
    check_local(path)
    with naming(path):
        _write_whole(path, write_to)


def check_file_to_be(path: Path, name: str) -> None:
    """Make the folder of a file that is written after long work, by `write_whole`. Raises at once what that would
    raise in the end: ValueError for a folder in its place, OSError for one that cannot be written to.

    name: of the option that gave it.
    """
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        partial = _partial(path)
        partial.touch()
        partial.unlink()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the path in errors of the system that do not, such as that of a full disk, or that name the file which
    would have taken its place."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {one_line(error)}") from None
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(_partial(Path(path)))):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _partial(path: Path) -> Path:
    """What is written before it takes the place of `path`: beside it, as a rename stays in one file system."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    with together() as written:
        partial = _partial(path)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            write_to(partial)
            partial.chmod(mode)  # safetensors makes files that only their owner can read
            sync(partial)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        written[path] = partial


@contextlib.contextmanager
def together() -> Iterator[dict[Path, Path]]:
    """Files that `write_whole` writes inside the block take their places at its end, all of them; none does if it
    raises. A crash while they do leaves some missing, but never new ones beside old ones.

    Yields what waits, by the path whose place it is to take. A block inside another one is a part of it.
    """
    if (waiting := getattr(_blocks, "written", None)) is not None:
        yield waiting
        return
    written = _blocks.written = {}
    try:
        yield written
        for path in list(written)[1:]:
            path.unlink(missing_ok=True)
        for path, partial in written.items():
            partial.replace(path)
        for folder in {path.parent for path in written}:
            sync(folder)
    finally:
        del _blocks.written
        for partial in written.values():
            partial.unlink(missing_ok=True)


def begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Make a folder for files that are made bit by bit, or go on with it.

    FOLDER/settings.json has what they follow from, as JSON knows it. Raises ValueError, naming a difference, if they
    were begun with other settings.
    """
    check_local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    try:
        before = {**json.loads(path.read_bytes())} if path.exists() else settings
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged; choose another --out, or delete {folder}") from None
    for name in sorted(before.keys() | settings.keys()):
        old, new = before.get(name), settings.get(name)
        if old != new:
            raise ValueError(f"{folder} was begun with {name} {old}, not {new}; choose another --out")
    write_whole(path, lambda partial: partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n"))


def fingerprint(path: Path) -> str:
    """Give the fingerprint of a file, or of the weights in a model's directory, as 16 hexadecimal digits: others have
    another one."""
    with (path / WEIGHTS_FILE if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def sync(path: Path) -> None:
    """Have a file's contents, or a directory's names, on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(
    directory: str | Path, config: UNetConfig, tensors: Mapping[str, Tensor], overwrite: bool = False
) -> None:
    """Write a model, given as its config and its state dict, to a directory, which is made if it is not there.

    A model that is there already is replaced if it has the same config. One with another config raises ValueError
    unless `overwrite` is set. Raises OSError if the model cannot be written; the one that was there is whole then.
    """
    check_local(directory)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sync(directory.parent)
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    is_same = _has_config(config_path, config)
    if not (is_same or overwrite) and (config_path.exists() or weights_path.exists()):
        raise ValueError(f"{directory} holds another model; choose another directory, or delete that one")
    row_major = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}  # what safetensors can store
    text = json.dumps({"format_version": FORMAT_VERSION, "unet": config.to_dict()}, indent=1) + "\n"
    try:
        with together():
            write_whole(weights_path, lambda path: save_file(row_major, path, metadata={"format": "pt"}))
            if not is_same:
                write_whole(config_path, lambda path: path.write_text(text))
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model cannot be written to {directory}: {one_line(error)}") from None


def read_config(path: Path) -> UNetConfig:
    """Read the config in a config.json. Raises FileNotFoundError, ValueError or TypeError that names file and key."""
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; the directory holds no saved model") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(saved, dict) or "format_version" not in saved:
        raise ValueError(f"{path} is not the config of an mdm_models model: it has no format_version")
    if saved["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {saved['format_version']!r}; this code reads {FORMAT_VERSION}")
    if strays := sorted(saved.keys() ^ {"format_version", "unet"}):
        raise ValueError(f"{path} must have the keys format_version and unet, no others: see {', '.join(strays)}")
    try:
        return UNetConfig.from_dict(saved["unet"])
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {one_line(error)}") from None


def opened(path: Path) -> safe_open:
    """Open a .safetensors file, mapped into memory. Raises FileNotFoundError, PermissionError, or ValueError if it is
    damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path.open("rb").close()  # of one that may not be read safetensors says that it is not there
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {one_line(error)}") from None


def mapped(file: safe_open, keys: list[str]) -> dict[str, Tensor]:
    """Give tensors of an open file, by name; their memory is the file's."""
    return {key: file.get_tensor(key) for key in keys}


def _has_config(path: Path, config: UNetConfig) -> bool:
    try:
        return read_config(path) == config
    except (OSError, ValueError, TypeError):
        return False
