"""The pictures and clips of a folder, and what says what each of them shows."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm_models.data.media import BadSample
from mdm_models.data.prepare.tables import rows_of
from mdm_models.data.prepare.url_list import CAPTION_COLUMNS
from mdm_models.plain_text import EXCEL, decoded, encoding_of, legible, stripped

# Files taken for pictures; of those that Pillow does not read, as iPhones' HEIC, each is named.
IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif"),
    *(".bmp", ".tif", ".tiff", ".gif", ".ppm"),
)
CLIPS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
SIDECARS = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv")
TABLES = (".parquet", ".arrow")
FILE_COLUMNS = ("file_name", "filename", "file")


@dataclass(frozen=True)
class Captioned:
    """A picture or clip. name: for people; media: its file or its bytes; caption: it, or the file that has it, "" where
    there is none; label: the number of its class, if it has one."""

    name: str
    media: Path | bytes
    caption: str | Path
    label: int | None = None

    @property
    def folder(self) -> Path:
        """The folder that its file lies in; Path() of bytes, which lie in none."""
        return Path() if isinstance(self.media, bytes) else self.media.parent

    def read(self) -> bytes:
        """Give the bytes of the picture or clip. Raises BadSample if they cannot be read."""
        return self.media if isinstance(self.media, bytes) else contents(self.media)

    def read_caption(self) -> str:
        """Give the caption, "" if there is none. Raises BadSample if it cannot be read."""
        if isinstance(self.caption, str):
            return stripped(self.caption)
        data = contents(self.caption)
        try:
            text = decoded(data)
            return stripped(caption_in(json.loads(text)) if self.caption.suffix == ".json" else text)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise BadSample("caption unreadable", f"{legible(str(self.caption))}: {error}") from None


def contents(file: Path) -> bytes:
    """The bytes of a file. Raises BadSample for one that cannot be read, OSError if its folder has gone."""
    if file.exists() and not file.is_file():  # whose bytes may never come, or never end
        raise BadSample("unreadable", f"{legible(str(file))} is no file but a pipe, a socket or a device")
    try:
        return file.read_bytes()
    except OSError as error:
        if not file.parent.is_dir():
            raise
        raise BadSample("unreadable", f"{legible(str(file))}: {error.strerror}") from None


def caption_in(fields: Any) -> str:
    """The caption among the fields of a JSON file or of a line of metadata; "" if there is none. Raises ValueError for
    one that is no text."""
    return _first_of(CAPTION_COLUMNS, fields)


def _first_of(names: tuple[str, ...], fields: Any) -> str:
    """The first text among the fields of these names, in upper or lower case; "" if there is none. Raises ValueError if
    nothing but numbers, lists and the like is there."""
    named = {str(name).strip().lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
    there = {name: named[name] for name in names if named.get(name) not in (None, "")}
    texts = [value for value in there.values() if isinstance(value, str)]
    if there and not texts:
        name, value = next(iter(there.items()))
        raise ValueError(f"its {name} is {json.dumps(value)[:100]}, which is no text")
    return next((text for text in texts if text.strip()), "")


def walk(root: Path) -> Iterator[Path]:
    """The files under a folder, in the order of their names, without hidden ones; links are followed, once. Warns of a
    folder that cannot be read."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_warn_unread, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _warn_unread(error: OSError) -> None:
    warnings.warn(f"{legible(str(error.filename))} is left out: {error.strerror}", stacklevel=1)


def tables(root: Path) -> list[Path]:
    """The files of a data set of Hugging Face's `datasets`; those of its split `train` if their names tell."""
    found = [path for path in walk(root) if path.suffix.lower() in TABLES and not path.name.startswith("cache-")]
    return [path for path in found if path.name.startswith("train")] or found


def is_media(path: Path) -> bool:
    """Whether a file's suffix is that of a picture or a clip."""
    return path.suffix.lower() in (*IMAGES, *CLIPS)


def holds_pictures(root: Path) -> bool:
    """Whether a folder can be prepared: it has pictures, clips or tables of them, at any depth."""
    return any(is_media(path) or path.suffix.lower() in TABLES for path in walk(root))


def fingerprint(root: Path) -> str:
    """Give a text that changes when a file under the folder comes, goes or changes: how many there are, and a hash of
    their names, sizes and times."""
    told = (*SIDECARS, *TABLES, ".jsonl", ".csv")
    files = [path for path in walk(root) if is_media(path) or path.suffix.lower() in told]
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat() if path.exists() else path.lstat()  # of a dangling link
        digest.update(f"{path.relative_to(root)}\n{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return f"{len(files)} {digest.hexdigest()[:16]}"


def captioned_files(root: Path, caption: str = "") -> tuple[list[tuple[str, Captioned]], list[str]]:
    """List the pictures and clips under a folder, each with a key of its own; and the names of the classes in the order
    of their numbers, if each picture's folder is all that says what it shows.

    caption: for those that have none. Raises ValueError if there are no pictures, or no captions.
    """
    files = [path for path in walk(root) if is_media(path)]
    if not files:
        raise ValueError(f"{root} has no pictures or clips ({', '.join((*IMAGES, *CLIPS))})")
    told = _metadata(root)
    beside = {_lowered(path): path for path in walk(root) if path.suffix.lower() in SIDECARS}
    found = [Captioned(legible(str(path.relative_to(root))), path, _caption(path, told, beside)) for path in files]
    _tell_unused(root, files, told, beside, found)
    if not caption and not any(one.caption or one.folder != root for one in found):
        beside_it = Path(found[0].name).with_suffix(".txt")
        raise ValueError(
            f"nothing says what the {len(found)} pictures of {root} show: write it into {beside_it} and so on, or into "
            f"{root / METADATA[1]} (file_name,text), sort them into folders named after it, or give one caption to all "
            "by `mdm prepare folder --caption TEXT`"
        )
    by_folder = not any(one.caption or one.folder == root for one in found)
    classes = sorted({one.folder.name for one in found}) if by_folder else []
    numbers = {name: number for number, name in enumerate(classes)}
    named = [_named_by_folder(one, root, numbers) for one in found]
    return list(_keyed(named)), [_words(name) for name in classes]


def _caption(path: Path, told: dict[str, str], beside: dict[Path, Path]) -> str | Path:
    if (name := _name(path)) in told:
        return told[name]
    wanted = (form for suffix in SIDECARS for form in (path.with_suffix(suffix), path.with_name(path.name + suffix)))
    return next((beside[form] for form in wanted if form in beside), "")


def _lowered(path: Path) -> Path:
    """With its suffix in lower case."""
    return path.with_suffix(path.suffix.lower())


def _name(path: Path) -> str:
    """One for all ways to write it: a Mac has é as two characters, Windows folders with backslashes."""
    return unicodedata.normalize("NFC", str(path).replace("\\", "/"))


def _tell_unused(
    root: Path, files: list[Path], told: dict[str, str], beside: dict[Path, Path], found: list[Captioned]
) -> None:
    """Warn of captions that belong to no picture, so that nobody trains without them unawares."""
    pictures = set(map(_name, files))
    used = {one.caption for one in found if isinstance(one.caption, Path)}
    strays = [name for name in told if name not in pictures]
    texts = [str(path) for path in beside.values() if path not in used and path.suffix.lower() != ".json"]
    for what, some in (("pictures that metadata name are not there", strays), ("texts belong to no picture", texts)):
        if some:
            warnings.warn(f"{root}: {len(some)} {what}, {legible(some[0])} among them", stacklevel=2)


def _named_by_folder(one: Captioned, root: Path, numbers: dict[str, int]) -> Captioned:
    """The same, named by the folder that it lies in where nothing else says what it shows."""
    if one.caption or one.folder == root:
        return one
    folder = one.folder.name
    return dataclasses.replace(one, caption=_words(folder), label=numbers.get(folder))


def _words(folder: str) -> str:
    return legible(folder).replace("_", " ").strip()


def _keyed(found: list[Captioned]) -> Iterator[tuple[str, Captioned]]:
    """Each with a key made of its path: without dots, at the first of which the suffix begins, and spaces."""
    taken: set[str] = set()
    for one in found:
        key = free = re.sub(r"[.\s]", "_", "_".join(Path(one.name).with_suffix("").parts))
        for twin in itertools.count(2):  # a.png beside a.jpg
            if free not in taken:
                break
            free = f"{key}-{twin}"
        taken.add(free)
        yield free, one


def _metadata(root: Path) -> dict[str, str]:
    """The captions of the metadata files under a folder, by the name of the file that they are about. Warns of records
    that cannot be read; raises ValueError for a file that has no others."""
    told: dict[str, str] = {}
    for path in walk(root):
        if path.name.lower() in METADATA:
            wrong, before = [], len(told)
            for number, fields in enumerate(_records(path), start=1):
                try:
                    name, caption = _told(fields)
                except ValueError as error:
                    wrong.append(f"record {number} cannot be read: {error}")
                    continue
                if not name:
                    wrong.append(f"record {number} has no file_name; each must name a file beside it")
                    continue
                about = _name(path.parent / name)
                if about in told:
                    wrong.append(f"record {number} is about {legible(name)} as an earlier one is, and replaces it")
                told[about] = caption
            if wrong and len(told) == before:
                raise ValueError(f"{path}: {wrong[0]}")
            if wrong:
                more = f"; so it is with {len(wrong) - 1} more" if len(wrong) > 1 else ""
                warnings.warn(f"{path}: {wrong[0]}{more}", stacklevel=2)
    return told


def _told(fields: Any) -> tuple[str, str]:
    """The file that a record is about, and its caption. Raises ValueError for one that cannot be read."""
    if isinstance(fields, ValueError):
        raise fields
    return _first_of(FILE_COLUMNS, fields), caption_in(fields)


def _records(path: Path) -> Iterator[Any]:
    """The records of a metadata file; in place of one that cannot be read, why. Raises ValueError."""
    try:
        data = path.read_bytes()
        with io.StringIO(data.decode(encoding_of(data), EXCEL), newline="") as file:
            if path.suffix.lower() == ".csv":
                rows = rows_of(file, ",", FILE_COLUMNS)
                columns = next(rows, [])
                yield from (_fields(columns, row) for row in rows)
            else:
                yield from (_parsed(line) for line in file if line.strip().strip("\0"))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _fields(columns: list[str], row: list[str]) -> dict[str, str] | ValueError:
    """The fields of a row by their columns, of which the first counts where two have one name."""
    if any(row[len(columns) :]):  # delimiters at the end of a line make empty ones
        return ValueError(f"it has {len(row)} fields, the first line names {len(columns)}; a comma needs quotes around")
    return dict(reversed(list(zip(columns, row, strict=False))))
