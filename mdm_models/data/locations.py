"""Where shards are: paths, URLs that fsspec opens, and commands that write a tar to their output.

A name with "://" is a URL (s3, gs, hf, http, memory, … each needs the package that fsspec names; credentials come from
where that package looks for them), a name that begins with "pipe:" is a shell command, any other name is a local path.
"""

import errno
import glob
import itertools
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import braceexpand
import fsspec
from fsspec.config import conf

from mdm_models.errors import DataError, one_line
from mdm_models.storage import write_whole

PIPE = "pipe:"
WAITS = (1, 4, 16)  # seconds between the attempts to reach a store
OUTAGE = 60  # seconds for which a store that was given up is not waited for
ANSWER = 10  # seconds in which a store has to answer a question; 1 while it is out
SILENCE = 20  # seconds in which something has to arrive of what a web server sends, however long the whole takes
MISSING = (404, 410)  # statuses of HTTP: there is no such thing
BUSY = (408, 425, 429)  # ask again later
FULL = (errno.ENOSPC, errno.EDQUOT)
_given_up: dict[str, float] = {}  # store → when
T = TypeVar("T")

# What tells one version of a file from the next, under the names that object stores give it; other facts of a file,
# such as a signed address, change from one look to the next.
VERSION_FIELDS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "md5Hash", "created")


class UnreachableError(Exception):
    """A shard that is not on a local disk cannot be had; the message is one line."""


def is_local(name: str) -> bool:
    """Whether a shard's name is a path on a local disk, neither a URL nor a command (pipe:…)."""
    return not name.startswith(PIPE) and "://" not in name


def expand(names: Iterable[str]) -> list[str]:
    """Find one name a shard from names of shards, folders of them (URLs of folders end in "/"), and patterns.

    Raises DataError if there are no names, for a local path that does not exist, for a folder or pattern that holds no
    tar, and for a URL that cannot be listed.
    """
    paths = [path for name in names for path in _expand_one(name.removeprefix("file://"))]
    if not paths:
        raise DataError("data: no shards are named; give tar files, folders of them, patterns or URLs")
    return paths


def _expand_one(name: str) -> list[str]:
    if os.path.isfile(name):
        return [name]  # whatever characters it has
    if os.path.isdir(name):
        try:
            files = sorted(os.listdir(name))
        except OSError as error:
            raise DataError(f"data: the folder {name} cannot be read: {error.strerror}") from None
        paths = [os.path.join(name, file) for file in files if file.endswith(".tar") and not file.startswith(".")]
        if not paths:
            raise DataError(
                f"data: the folder {name} holds no *.tar file; if it holds pictures, `mdm prepare folder {name} --out "
                "SHARDS` makes shards of them"
            )
        return paths
    folder = _folder_of(name) if is_local(name) else ""
    try:
        patterns = list(braceexpand.braceexpand(name.removeprefix(folder)))
    except braceexpand.UnbalancedBracesError:  # pyright: ignore[reportAttributeAccessIssue]: no such types there
        raise DataError(f"data: the braces of {name!r} are not balanced") from None
    paths = [path for pattern in patterns for path in _matches(folder, pattern)]
    if not paths:
        raise DataError(f"data: no file matches {name!r}")
    for path in paths:
        if is_local(path) and not os.path.isfile(path):
            raise DataError(f"data: there is no shard {path}" + (f" (of {name})" if path != name else ""))
    return paths


def _folder_of(name: str) -> str:
    """The longest beginning of a path that is a folder: no pattern, though it may have brackets or braces."""
    folder = os.path.dirname(name)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _matches(folder: str, pattern: str) -> list[str]:
    """The shards of a pattern inside a folder; "" for a pattern that begins anywhere."""
    if is_local(folder + pattern):
        return sorted(glob.glob(glob.escape(folder) + pattern)) if glob.has_magic(pattern) else [folder + pattern]
    if pattern.startswith(PIPE):
        return [pattern]
    pattern += "*.tar" * pattern.endswith("/")
    if "*" not in pattern and "[" not in pattern:  # a "?" begins the query of a URL
        return [pattern]
    try:
        system, path = file_system(pattern)
        if system.exists(path):
            return [pattern]
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except DataError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise DataError(f"data: {pattern} cannot be listed: {one_line(error)}") from None


def patiently(attempt: Callable[[], T], store: str = "", waits: Sequence[float] | None = None) -> T:
    """Return what `attempt()` returns, and try it again after a while if it raises.

    store: whom it asks: where one has just been given up, the next attempt is not waited for. waits: seconds between
    attempts, WAITS if None. Raises FileNotFoundError at once if that is what it found, OSError if a local disk is full,
    UnreachableError when it has failed too often, or where trying again is of no use.
    """
    remaining = iter(WAITS if waits is None else waits)
    while True:
        try:
            found = attempt()
        except Exception as error:  # each store has exceptions of its own
            if _is_missing(error):
                raise FileNotFoundError(_said(error)) from None
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            hopeless = isinstance(error, PermissionError) or (_status(error) // 100 == 4 and _status(error) not in BUSY)
            wait = None if hopeless or is_out(store) else next(remaining, None)
            if wait is None:
                if store and not hopeless:
                    _given_up[store] = time.monotonic()
                raise UnreachableError(_said(error)) from None
        else:
            _given_up.pop(store, None)
            return found
        time.sleep(wait)


def is_out(store: str) -> bool:
    """Whether a store was given up a moment ago."""
    return time.monotonic() - _given_up.get(store, -math.inf) < OUTAGE


def store_of(name: str) -> str:
    """Name whom a URL asks: its protocol and host or bucket; "" for a command, each of which is its own."""
    return "" if name.startswith(PIPE) else "://".join(urlsplit(name)[:2])


def _is_missing(error: Exception) -> bool:
    """Whether there is no such file or bucket; fsspec's http says so too of a server that does not answer."""
    if isinstance(error, FileNotFoundError):
        return not _is_of_http(error.__cause__) or _status(error.__cause__) in MISSING
    return _status(error) in MISSING


def _is_of_http(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] == "aiohttp"


def _said(error: BaseException) -> str:
    """What an error of a store says, in one line: of fsspec's http, which names but the URL, what was behind it."""
    behind = error.__cause__
    if isinstance(error, TimeoutError) or isinstance(behind, TimeoutError):
        return "there is no answer"
    if behind is not None and _is_of_http(behind):
        return f"{type(behind).__name__}: {one_line(behind)}"
    return one_line(error)


def _status(error: BaseException | None) -> int:
    """The HTTP status that an error of a store tells of; 0 if it tells of none."""
    response = getattr(error, "response", None)
    told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}  # as botocore has it
    behind = [getattr(response, "status_code", None), told.get("HTTPStatusCode")]
    found = itertools.chain((getattr(error, name, None) for name in ("status", "status_code", "code")), behind)
    return next((status for status in found if isinstance(status, int) and status), 0)


def file_system(name: str, **options: Any) -> tuple[Any, str]:
    """Give the file system of a URL, and the path in it; options: further ones of the file system.

    Raises DataError for a protocol that is unknown or whose package is missing, UnreachableError where a store, with
    which a connection is made here, does not take one.
    """
    protocol = urlsplit(name).scheme
    if protocol in ("http", "https"):
        import aiohttp  # which would end whatever takes five minutes

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER, sock_read=SILENCE)
        configured = conf.get(protocol, {}).get("client_kwargs", {})
        options["client_kwargs"] = {"timeout": timeout} | configured
    try:
        if protocol == "hf":
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # one a file, across that of a run; HF_HUB_DISABLE_PROGRESS_BARS=0 keeps them
        return fsspec.url_to_fs(name, **options)
    except (ImportError, ValueError) as error:
        raise DataError(f"data: {name} cannot be opened: {one_line(error)}") from None
    except Exception as error:  # each store has exceptions of its own
        raise UnreachableError(_said(error)) from None


def look_up(name: str, waits: Sequence[float] | None = None) -> tuple[int | None, str]:
    """Find the size in bytes of a shard that is not local, None if unknown, and what tells its version.

    waits: seconds between attempts, as for `patiently`.
    Raises DataError if there is no such file, UnreachableError if that cannot be found out.
    """
    if name.startswith(PIPE):
        return None, ""
    store = store_of(name)
    system, path = file_system(name)

    def ask() -> dict:
        limit = {"timeout": 1 if is_out(store) else ANSWER} if system.async_impl else {}
        return system.info(path, **limit)

    try:
        info = patiently(ask, store, waits)
    except FileNotFoundError:
        raise DataError(f"data: there is no shard {name}") from None
    if info.get("type") == "directory":
        raise DataError(f"data: {name} is a folder; end it in / to take all of its shards")
    return info.get("size"), str([str(info[field]) for field in VERSION_FIELDS if field in info])


def download(name: str, target: Path) -> None:
    """Write a shard that is not local to the file `target`. Raises whatever the store raises; OSError for a command
    that fails."""
    if not name.startswith(PIPE):
        system, path = file_system(name)
        system.get_file(path, str(target))
        return
    with target.open("wb") as file:
        command = name.removeprefix(PIPE)
        ended = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
    if ended.returncode:
        said = " ".join(ended.stderr.decode(errors="replace").split())[-200:]
        raise OSError(f"the command ended with status {ended.returncode}: {said}")


def read_beside(name: str, suffix: str) -> bytes | None:
    """Read the small file NAME + `suffix`; None if there is none that can be read."""
    if name.startswith(PIPE):
        return None
    try:
        system, path = file_system(name + suffix)
        return system.cat_file(path)
    except Exception:  # some stores answer "forbidden" where there is no file
        return None


def write_beside(name: str, suffix: str, data: bytes) -> None:
    """Write the small file NAME + `suffix`, whole. Raises DataError if that cannot be done."""
    if name.startswith(PIPE):
        raise DataError(f"data: nothing can be written beside the command {name}")
    try:
        if is_local(name):
            write_whole(Path(name + suffix), lambda path: path.write_bytes(data))
        else:
            system, path = file_system(name + suffix)
            system.pipe_file(path, data)
    except Exception as error:
        raise DataError(f"data: {name}{suffix} cannot be written: {one_line(error)}") from None
