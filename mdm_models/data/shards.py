"""WebDataset shards as one numbered list of samples.

A run reads samples in an order that depends on nothing but the seed and its place in the run, which needs random
access: the headers of every tar are read once, and a sample is later read with one seek.

What the start costs. Local shards are read at 30 000 files a second and process, ranks sharing the work, at every
start. A shard elsewhere must be copied whole for it, once: what was found is kept in the cache folder, so that the next
start only asks for the shard's size and date. Where that is too long (a terabyte, a new machine every day), `mdm index`
leaves SHARD.index beside each shard, 16 bytes a sample, from which any machine starts without reading a shard.
"""

import dataclasses
import io
import math
import os
import tarfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mdm_models.data.cache import ShardCache
from mdm_models.data.config import DataConfig
from mdm_models.data.layout import content, in_roles, split_name
from mdm_models.data.locations import UnreachableError, expand, is_local, is_out, look_up, read_beside, store_of
from mdm_models.data.media import BadSample
from mdm_models.data.plain_tar import plain_files
from mdm_models.data.shard_index import INDEX, Shard, from_bytes, hash_of, is_of, scan, to_bytes
from mdm_models.errors import DataError
from mdm_models.processes import ALONE, Processes

WAITS_AT_START = (1, 2)  # seconds between the attempts to ask for a shard when a run begins
AT_ONCE = 8  # shards that a process looks at, and copies, at the same time
OPEN_COPIES = 8  # copies that a process keeps open
TRY_AGAIN = 600  # seconds until a shard that could not be reached is asked for again


def open_shards(config: DataConfig, processes: Processes = ALONE) -> list[Shard]:
    """Open the shards that `config.shards` names, in order; the ranks of a distributed run share the work.

    A shard that cannot be reached stays in the list, without samples. Raises DataError, the same on all ranks, for a
    name that stands for nothing, a shard that is no tar, more than `config.max_bad_share` of them out of reach, or no
    sample in any of them.
    """
    rank, world_size = processes.rank, processes.world_size
    cache = ShardCache.of(config.cache, config.cache_gb)
    names = processes.agree(lambda: expand(config.shards))
    if any(other != names[0] for other in names):
        raise DataError(f"data: the processes do not see the same shards under {', '.join(config.shards)}")
    names = names[0]

    shards: list[Shard] = []
    bar = tqdm(total=len(names), desc="finding the samples", unit=" shards", delay=5, disable=not processes.is_main)
    with ThreadPoolExecutor(AT_ONCE) as pool, bar:
        for start in range(0, len(names), AT_ONCE * world_size):  # in rounds: nobody must wait for hours
            now = names[start : start + AT_ONCE * world_size]
            mine = now[rank::world_size]
            shares = processes.agree(lambda mine=mine: list(pool.map(lambda name: open_shard(name, cache), mine)))
            shards += [shares[i % world_size][i // world_size] for i in range(len(now))]
            _check_reached(shards, len(names), config.max_bad_share)
            bar.update(len(now))
    if not any(map(len, shards)):
        raise DataError(f"data: no image or clip in {', '.join(config.shards)}")
    return shards


def open_shard(name: str, cache: ShardCache) -> Shard:
    """Find a shard's samples, from an index if there is one. Raises DataError."""
    if is_local(name):
        index = read_beside(name, INDEX) if os.path.exists(name + INDEX) else None
        shard = from_bytes(index, name, os.path.getsize(name)) if index else None
        return shard if shard is not None and is_of(shard, name) else scan(name, may_be_empty=True)
    cache.prepare()
    version = ""
    try:
        size, version = _looked_up(name, cache)
        index = cache.recall(name, version) or read_beside(name, INDEX)
        shard = from_bytes(index, name, size) if index else None
        if shard is None:
            with cache.open(name, size, version, WAITS_AT_START) as file:
                shard = scan(file.name, name, may_be_empty=True)
            cache.remember(name, version, to_bytes(shard))
    except UnreachableError as error:
        nothing = np.zeros(0, np.uint64)
        shard = Shard(name, np.zeros(1, np.int64), nothing, 0, damage=f"cannot be reached: {error}")
    return dataclasses.replace(shard, version=version, cache=cache)


def _looked_up(name: str, cache: ShardCache) -> tuple[int | None, str]:
    """`look_up`; where a store cannot be asked, the copy that there is. Soon, as a run waits for it to begin."""
    known, store = cache.last_seen(name), store_of(name)
    try:
        if known and is_out(store):
            return known
        size, version = look_up(name, waits=() if known else WAITS_AT_START)
    except UnreachableError:
        if known is None:
            raise
        warnings.warn(f"{store or name} cannot be asked; copies of its shards are used as they are", stacklevel=2)
        return known
    cache.note(name, size, version)
    return size, version


def _check_reached(shards: list[Shard], count: int, max_bad_share: float) -> None:
    """Raise DataError if too many of `count` shards, of which these have been asked for, cannot be reached."""
    lost = [shard for shard in shards if not shard.reached]
    if len(lost) > max_bad_share * count:
        raise DataError(f"data: {len(lost)} of {count} shards, among them {lost[0].path}, {lost[0].damage}")


class ShardedSamples:
    """A sequence of samples, each a dict: "__key__" and, for every file of the sample, its suffix → its bytes."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.first = np.cumsum([0, *map(len, shards)])  # number of each shard's first sample
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # copies, by number of the shard, last used last
        self._lost: dict[int, tuple[float, str]] = {}  # shards that could not be reached: when, and why

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def keys(self) -> np.ndarray:
        """The keys of all samples as `hash_of` gives them, (samples,) uint64."""
        return np.concatenate([np.zeros(0, np.uint64), *(shard.keys for shard in self.shards)])

    def number_of(self, index: int) -> int:
        """Give the number of the shard that holds a sample."""
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def shard_of(self, index: int) -> Shard:
        return self.shards[self.number_of(index)]

    def __getitem__(self, index: int) -> dict:
        """Raises UnreachableError if the shard cannot be had, OSError if it has gone or changed since its samples were
        found, BadSample for a sample that has a file twice."""
        number = self.number_of(index)
        shard = self.shards[number]
        start, end = shard.bounds[index - self.first[number] :][:2].tolist()
        if shard.cache:
            data = os.pread(self._copy(number).fileno(), end - start, start)  # its place is shared after a fork
        else:
            with shard.open() as file:
                if (size := os.fstat(file.fileno()).st_size) != shard.size:
                    raise OSError(f"it has {size} bytes, not the {shard.size} as when its samples were found")
                file.seek(start)
                data = file.read(end - start)
        return _sample(data, shard, int(shard.keys[index - self.first[number]]))

    def fetch(self, number: int) -> None:
        """Have a copy of shard `number` at hand, if it needs one. Raises UnreachableError."""
        shard = self.shards[number]
        if shard.cache:
            shard.cache.fetch(shard.path, shard.size, shard.version)

    def _copy(self, number: int) -> BinaryIO:
        """The copy of a shard, kept open so that it stays in the cache while it is read."""
        if number not in self._open:
            since, reason = self._lost.get(number, (-math.inf, ""))
            if time.monotonic() - since < TRY_AGAIN:
                raise UnreachableError(reason)
            try:
                self._open[number] = self.shards[number].open()
            except UnreachableError as error:
                self._lost[number] = time.monotonic(), str(error)
                raise
            if len(self._open) > OPEN_COPIES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


def _sample(data: bytes, shard: Shard, key_hash: int) -> dict:
    """The files of the sample that begins these bytes of a shard. Raises OSError if it is another one, BadSample."""
    files: dict[str, bytes] = {}
    own = ""
    try:
        for name, read in _files(data):
            named = split_name(name)
            if named is None:
                continue
            key, suffix = named
            if hash_of(key) != key_hash:  # of the sample behind it, which has no picture
                break
            own = key
            if suffix in files:
                raise BadSample("file twice", f"a duplicate .{suffix} (upper and lower case are one)", key)
            files[suffix] = read()
    except (tarfile.TarError, ValueError, EOFError):
        own = ""
    if not own:
        raise OSError("it is not what it was when its samples were found")
    return {"__key__": own, "__url__": shard.path, **in_roles(files)}


def _files(data: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The regular files in these bytes of a tar, by name, and what reads them. Raises TarError or ValueError."""
    plain = plain_files(data)
    if plain is not None:
        yield from ((name, lambda whole=whole: whole) for name, whole in plain)
        return
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.isreg():
                yield member.name, partial(content, tar, member)
