"""Where each sample of a tar lies: found by reading its headers once, about 30 000 files a second.

A sample without an image or a clip is left out: for each link that was dead, video2dataset
writes caption and metadata alone.
"""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from mdm_models.data.cache import ShardCache
from mdm_models.data.layout import is_media, split_name
from mdm_models.errors import DataError, one_line

INDEX = ".index"  # SHARD.index beside a shard is what `mdm index` wrote
INDEX_FORMAT = 2
COMPRESSED = "is compressed, which leaves no sample to be read by itself: unpack it, as gunzip, unxz, … do"
COMPRESSIONS = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")  # how files of gzip, xz, bzip2 and zstd begin


@dataclass(frozen=True, eq=False)
class Shard:
    """One tar file: sample i begins at byte bounds[i] and ends before bounds[i + 1]."""

    path: str  # a local path, a URL or a command, see `locations`
    bounds: np.ndarray  # (samples + 1,) int64
    keys: np.ndarray  # (samples,) uint64: `hash_of` their keys
    size: int  # bytes; 0 if it cannot be reached
    without_media: int = 0  # samples with neither an image nor a clip, which are left out
    damage: str = ""  # where the tar breaks off, or why it cannot be had; the samples before that are used
    apart: int = 0  # how often files of a sample lie apart from the others of its key
    version: str = ""  # tells it from another file that was at the same place
    cache: ShardCache | None = None  # where its copy is; None: it is on a local disk itself

    def __len__(self) -> int:
        return len(self.keys)

    def open(self) -> BinaryIO:
        """Open the tar, or its copy, made first if need be. Raises OSError, or UnreachableError if it cannot be had."""
        return self.cache.open(self.path, self.size, self.version) if self.cache else open(self.path, "rb")

    @property
    def reached(self) -> bool:
        """Whether its bytes could be had when its samples were to be found."""
        return self.size > 0


def hash_of(key: str) -> int:
    """Hash a key to 64 bits that depend on it alone, on any machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def scan(path: str, name: str = "", may_be_empty: bool = False) -> Shard:
    """Find where each sample of the local tar file `path` lies.

    name: what it is a copy of, if it is one; may_be_empty: a whole tar without files will do, as img2dataset leaves one
    where all links were dead. Raises DataError if nothing in it can be used.
    """
    name = name or path
    bounds: list[int] = []
    keys: list[int] = []
    without_media, damage = 0, ""
    begun: set[int] = set()  # the keys of all samples
    apart = 0
    begin, current, has_media = 0, None, False  # of the sample that is being read

    def end_sample() -> None:
        nonlocal without_media
        if has_media and current is not None:
            bounds.append(begin)
            keys.append(hash_of(current))
        elif current is not None:
            without_media += 1

    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                try:
                    member = tar.next()
                except (tarfile.TarError, ValueError):  # a ValueError: of numbers in a header
                    damage = f"is cut off after byte {tar.offset}"
                    break  # the last sample's data reach past the end: it is not ended
                if member is None:
                    end_sample()
                    break
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: they would be kept, some 1000 bytes each
                named = split_name(member.name)
                if not member.isreg() or named is None:
                    continue
                key, suffix = named
                if key != current:
                    end_sample()
                    begin, current, has_media = member.offset, key, False
                    apart += hash_of(key) in begun
                    begun.add(hash_of(key))
                has_media = has_media or is_media(suffix)
            end = tar.offset
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)) and not damage:  # tarfile takes a broken header for the end
                damage = f"is damaged at byte {end}"
            elif not damage and any(map(any, iter(lambda: file.read(1 << 20), b""))):
                damage = f"goes on behind its end at byte {end}, as tars that were put one behind the other"
            size = file.seek(0, io.SEEK_END)
    except tarfile.TarError as error:
        why = COMPRESSED if is_compressed(path) else f"is not a tar file: {error}"
        raise DataError(f"data: shard {name} {why}") from None
    except OSError as error:
        raise DataError(f"data: shard {name} cannot be read: {one_line(error)}") from None
    if (current is None and not may_be_empty) or (damage and not bounds):
        raise DataError(f"data: shard {name} {damage or 'holds no samples'}")
    places = np.array([*bounds, end], dtype=np.int64)
    return Shard(name, places, np.array(keys, dtype=np.uint64), size, without_media, damage, apart)


def is_of(shard: Shard, path: str) -> bool:
    """Whether the first, the middle and the last sample that an index tells of begin where it says in the tar at this
    path, which may have become another of the same size."""
    if not len(shard):
        return False
    with open(path, "rb") as file:
        for i in {0, len(shard) // 2, len(shard) - 1}:
            file.seek(int(shard.bounds[i]))
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    named = split_name(getattr(tar.next(), "name", ""))
            except (tarfile.TarError, ValueError):
                return False
            if named is None or hash_of(named[0]) != shard.keys[i]:
                return False
    return True


def is_compressed(path: str) -> bool:
    """Whether a file begins as those of gzip, xz, bzip2 and zstd do. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return file.read(8).startswith(COMPRESSIONS)


def to_bytes(shard: Shard) -> bytes:
    """Write what was found in a shard as bytes, to be kept in a file: 16 bytes a sample."""
    file = io.BytesIO()
    facts = np.array([INDEX_FORMAT, shard.size, shard.without_media, shard.apart], dtype=np.int64)
    np.savez(file, facts=facts, bounds=shard.bounds, keys=shard.keys, damage=np.array(shard.damage))
    return file.getvalue()


def from_bytes(data: bytes, path: str, size: int | None) -> Shard | None:
    """Make the shard again of what `to_bytes` wrote; None if `data` are no such thing or of a shard of another size
    than `size` bytes."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            form, length, without_media, *rest = file["facts"].tolist()
            if size is not None and size != length:
                return None
            if form == 1 and not without_media:  # it knew fewer layouts, but here it missed nothing
                rest = [0]
            elif form != INDEX_FORMAT:
                return None
            (apart,) = rest
            return Shard(path, file["bounds"], file["keys"], length, without_media, str(file["damage"]), apart)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile):
        return None
