"""WebDataset shards as one numbered list of samples.

A run reads samples in an order that depends on nothing but the seed and the number of samples seen, which needs random
access: the headers of every tar are scanned once at start-up (about 30 000 files a second and process; ranks share the
work), and a sample is later read with one seek. Grouping files into samples is WebDataset's own: the name up to the
first dot is the key, and the files of a sample are neighbours in the tar.
"""

import glob
import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

import braceexpand
import numpy as np
import torch.distributed as dist
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from mdm_models.training.errors import DataError


@dataclass(frozen=True)
class Shard:
    """One tar file: sample i is bytes bounds[i] … bounds[i + 1], a tar stream without its end mark."""

    path: str
    bounds: np.ndarray  # (samples + 1,) int64
    damage: str = ""  # where the tar breaks off, if it does; the samples before that are used


def expand(data: Iterable[str]) -> list[str]:
    """Paths of the shards that `data` names: tar files, folders of them, brace and wildcard patterns.

    Raises DataError for a path that does not exist and for a folder or pattern that holds no tar.
    """
    return [path for name in data for path in _expand_one(name)]


def _expand_one(name: str) -> list[str]:
    if os.path.isdir(name):
        paths = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not paths:
            raise DataError(f"data: the folder {name} holds no *.tar file")
        return paths
    try:
        patterns = list(braceexpand.braceexpand(name))
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"data: the braces of {name!r} are not balanced") from None
    paths = [path for p in patterns for path in (sorted(glob.glob(p)) if glob.has_magic(p) else [p])]
    if not paths:
        raise DataError(f"data: no file matches {name!r}")
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"data: there is no shard {path}" + (f" (of {name})" if path != name else ""))
    return paths


def scan(path: str) -> Shard:
    """Find where each sample of a tar lies, reading headers only. Raises DataError if nothing in it can be used."""
    bounds: list[int] = []
    damage, previous = "", None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.TarError:
                    damage = f"is cut off after byte {tar.offset}"
                    bounds = bounds[:-1]  # the last sample's data reach past the end
                    break
                if member is None:
                    break
                key, _ = base_plus_ext(member.name)
                if member.isreg() and key is not None and key != previous:
                    bounds.append(member.offset)
                    previous = key
            end = tar.offset
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)) and not damage:  # tarfile takes a broken header for the end
                damage = f"is damaged at byte {end}"
    except tarfile.TarError as error:
        raise DataError(f"data: shard {path} is not an (uncompressed) tar file: {error}") from None
    except OSError as error:
        raise DataError(f"data: shard {path} cannot be read: {error.strerror}") from None
    if not bounds:
        raise DataError(f"data: shard {path} {damage or 'holds no samples'}")
    return Shard(path, np.array([*bounds, end], dtype=np.int64), damage)


def scan_all(paths: list[str]) -> list[Shard]:
    """`scan` of every path, in order; the ranks of a distributed run share the work and raise the same error."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    try:
        mine: list[Shard] | DataError = [scan(path) for path in paths[rank::world]]
    except DataError as error:
        mine = error
    shares = [mine]
    if distributed:
        shares = [None] * world
        dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, DataError):
            raise share
    return [shares[i % world][i // world] for i in range(len(paths))]


class ShardedSamples:
    """A sequence of samples, each a dict: "__key__" and, for every file of the sample, its suffix → its bytes."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.first = np.cumsum([0] + [len(shard.bounds) - 1 for shard in shards])  # number of each shard's first sample

    def __len__(self) -> int:
        return int(self.first[-1])

    def shard_of(self, index: int) -> Shard:
        return self.shards[np.searchsorted(self.first, index, side="right") - 1]

    def __getitem__(self, index: int) -> dict:
        """Raises OSError or tarfile.TarError if the file has gone or changed since it was scanned."""
        number = np.searchsorted(self.first, index, side="right") - 1
        shard = self.shards[number]
        start, end = shard.bounds[index - self.first[number] :][:2]
        with open(shard.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        files = (file | {"__url__": shard.path} for file in tar_file_iterator(io.BytesIO(data)))
        return next(iter(group_by_keys(files)), {"__key__": f"byte {start}"})
