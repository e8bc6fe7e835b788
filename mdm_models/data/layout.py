"""Which files of a tar are a sample's, and which of them is its picture and its caption.

The rules are WebDataset's: the name up to the first dot is the key, what follows is the suffix, and the files of a
sample are neighbours. A picture or caption may have a name of its own before its suffix, as in KEY.img.jpg and
KEY.caption.txt.
"""

import tarfile
from collections.abc import Mapping
from typing import TypeVar

from webdataset.tariterators import base_plus_ext

from mdm_models.plain_text import legible

CLIP_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
MEDIA = frozenset(CLIP_SUFFIXES + IMAGE_SUFFIXES)
CAPTION_SUFFIXES = ("txt", "json", "cls")
TEXT_SUFFIXES = ("txt", "text", "caption")  # of captions in plain text
NAMES = {"img", "image", "picture", "video", "clip", "caption", "text", "txt", "prompt", "label", "class"}
NEIGHBOURS = (
    "this tar has the files of a sample apart from each other, where they must be neighbours: make it again with its "
    "files in the order of their names, as tar --sort=name does"
)

Content = TypeVar("Content")


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a file in a tar. Raises ValueError for what is no file, such as a folder."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def split_name(name: str) -> tuple[str, str] | None:
    """Split a file's name in a tar into its sample's key and its suffix in lower case; None for a file of no sample."""
    key, suffix = base_plus_ext(name)
    return None if key is None or suffix is None else (legible(key), legible(suffix).lower())


def is_media(suffix: str) -> bool:
    """Whether a file of this suffix, such as "jpg" or "img.jpg", is a picture or a clip."""
    return suffix.rpartition(".")[2] in MEDIA


def in_roles(files: Mapping[str, Content]) -> dict[str, Content]:
    """The files of a sample by their suffixes, and its picture or clip and its captions by the plain ones as well: as
    "jpg" what is there as "img.jpg", as "txt" what is there as "text" or "caption.txt".

    Where several files may be meant (img.jpg, mask.png), it is the one with a usual name; without one, none is.
    """
    found = dict(files)
    if not MEDIA & found.keys():
        for suffix in _only([suffix for suffix in files if is_media(suffix)]):
            found[suffix.rpartition(".")[2]] = files[suffix]
    for wanted, endings in (("txt", TEXT_SUFFIXES), ("json", ("json",)), ("cls", ("cls",))):
        if wanted not in found:
            for suffix in _only([suffix for suffix in files if suffix.rpartition(".")[2] in endings]):
                found[wanted] = files[suffix]
    return found


def _only(suffixes: list[str]) -> list[str]:
    """The one that can be meant; none if there is no such one."""
    if len(suffixes) > 1:
        suffixes = [suffix for suffix in suffixes if set(suffix.split(".")[:-1]) & NAMES]
    return suffixes if len(suffixes) == 1 else []
