"""Where each sample of a tar lies: found by reading its headers once, about 30 000 files a second.

Grouping files into samples is WebDataset's own: the name up to the first dot is the key, and the files of a sample are
neighbours in the tar. A sample without an image or a clip is left out: for each link that was dead, video2dataset
writes caption and metadata alone.
"""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from mdm_models.data.cache import ShardCache
from mdm_models.errors import DataError

CLIP_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
MEDIA = frozenset(CLIP_SUFFIXES + IMAGE_SUFFIXES)
INDEX = ".index"  # SHARD.index beside a shard is what `mdm index` wrote
INDEX_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Shard:
    """One tar file: sample i begins at byte bounds[i] and ends before bounds[i + 1]."""

    path: str  # a local path, a URL or a command, see `locations`
    bounds: np.ndarray  # (samples + 1,) int64
    keys: np.ndarray  # (samples,) uint64: `hash_of` their keys
    size: int  # bytes; 0 if it cannot be reached
    without_media: int = 0  # samples with neither an image nor a clip, which are left out
    damage: str = ""  # where the tar breaks off, or why it cannot be had; the samples before that are used
    version: str = ""  # tells it from another file that was at the same place
    cache: ShardCache | None = None  # where its copy is; None: it is on a local disk itself

    def __len__(self) -> int:
        return len(self.keys)

    def open(self) -> BinaryIO:
        """The tar, or its copy, made first if need be. Raises OSError, or UnreachableError if it cannot be had."""
        return self.cache.open(self.path, self.size, self.version) if self.cache else open(self.path, "rb")

    @property
    def reached(self) -> bool:
        """Whether its bytes could be had when its samples were to be found."""
        return self.size > 0


def hash_of(key: str) -> int:
    """64 bits that depend on the key alone, on any machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def scan(path: str, name: str = "") -> Shard:
    """Find where each sample of the local tar file `path` lies.

    name: what it is a copy of, if it is one. Raises DataError if nothing in it can be used.
    """
    name = name or path
    bounds: list[int] = []
    keys: list[int] = []
    without_media, damage = 0, ""
    begin, current, has_media = 0, None, False  # of the sample that is being read

    def end_sample() -> None:
        nonlocal without_media
        if has_media:
            bounds.append(begin)
            keys.append(hash_of(current))
        elif current is not None:
            without_media += 1

    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.TarError:
                    damage = f"is cut off after byte {tar.offset}"
                    break  # the last sample's data reach past the end: it is not ended
                if member is None:
                    end_sample()
                    break
                tar.members.clear()  # they would be kept, some 1000 bytes each
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or key is None:
                    continue
                if key != current:
                    end_sample()
                    begin, current, has_media = member.offset, key, False
                has_media = has_media or suffix.lower() in MEDIA
            end = tar.offset
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)) and not damage:  # tarfile takes a broken header for the end
                damage = f"is damaged at byte {end}"
            size = file.seek(0, io.SEEK_END)
    except tarfile.TarError as error:
        raise DataError(f"data: shard {name} is not an (uncompressed) tar file: {error}") from None
    except OSError as error:
        raise DataError(f"data: shard {name} cannot be read: {error.strerror}") from None
    if current is None or (damage and not bounds):
        raise DataError(f"data: shard {name} {damage or 'holds no samples'}")
    return Shard(
        name, np.array([*bounds, end], dtype=np.int64), np.array(keys, dtype=np.uint64), size, without_media, damage
    )


def to_bytes(shard: Shard) -> bytes:
    """What was found in a shard, to be kept in a file: 16 bytes a sample."""
    file = io.BytesIO()
    facts = np.array([INDEX_FORMAT, shard.size, shard.without_media], dtype=np.int64)
    np.savez(file, facts=facts, bounds=shard.bounds, keys=shard.keys, damage=np.array(shard.damage))
    return file.getvalue()


def from_bytes(data: bytes, path: str, size: int | None) -> Shard | None:
    """The inverse of `to_bytes`; None if `data` are no such thing or of a shard of another size than `size` bytes."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            form, length, without_media = file["facts"].tolist()
            if form != INDEX_FORMAT or (size is not None and size != length):
                return None
            return Shard(path, file["bounds"], file["keys"], length, without_media, str(file["damage"]))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        return None
