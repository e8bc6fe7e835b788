"""What tells a shard's contents from others: to notice data that change under a run, or between two."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mdm_models.data.shard_index import Shard
from mdm_models.errors import DataError

BLOCK = 4096  # bytes that are looked at, at the beginning, in the middle, and where the last sample begins


@dataclass(frozen=True)
class ShardRecord:
    """A shard as it was: its name, for people; a digest of its contents, "" if they could not be had; its samples."""

    name: str
    digest: str
    samples: int


def record_of(shard: Shard) -> ShardRecord:
    """Record a shard by three blocks of a local one, or by the store's version of one elsewhere. Raises DataError."""
    if not shard.reached:
        return ShardRecord(shard.path, "", 0)
    digest = hashlib.blake2b(f"{shard.size} {shard.version}".encode(), digest_size=8)
    digest.update(shard.keys.tobytes() + shard.bounds.tobytes())
    if not shard.cache:
        try:
            with shard.open() as file:
                for place in (0, shard.size // 2, int(shard.bounds[-2:][0])):
                    file.seek(place)
                    digest.update(file.read(BLOCK))
        except OSError as error:
            raise DataError(f"data: shard {shard.path} cannot be read: {error.strerror}") from None
    return ShardRecord(shard.path, digest.hexdigest(), len(shard))


class Watch:
    """Shards on local disks, looked at now and again for whether they are what they were."""

    def __init__(self, shards: Sequence[Shard], records: Sequence[ShardRecord], max_bad_share: float):
        """max_bad_share: how many of all shards may be gone, as a share."""
        self.max_bad_share = max_bad_share
        self.count = len(shards)
        self._watched = [(s, r, _stamp(s.path)) for s, r in zip(shards, records, strict=True) if not s.cache]

    def check(self) -> None:
        """Look at the shards again. Raises DataError that names one that has other contents, or one of too many that
        are gone."""
        gone = []
        for i, (shard, record, stamp) in enumerate(self._watched):
            now = _stamp(shard.path)
            if now is None:
                gone.append(shard.path)
            elif now != stamp:
                if now[0] != shard.size or record_of(shard) != record:
                    raise DataError(f"data: shard {shard.path} was changed while the run read it")
                self._watched[i] = shard, record, now  # the same again, touched or copied
        if len(gone) > self.max_bad_share * self.count:
            raise DataError(f"data: {len(gone)} of {self.count} shards are gone since the run began, as {gone[0]}")


def _stamp(path: str) -> tuple[int, int, int] | None:
    """A file's size, and when its contents changed and when anything of it did, which none can set back; None if it is
    not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def changes(before: Sequence[ShardRecord], now: Sequence[ShardRecord]) -> tuple[list[str], list[str]]:
    """What a run that goes on from `before` with the shards `now` would not see again as it was; and what is merely
    new. Each a line; shards that have moved are the same."""
    known = {record.digest for record in now}
    names = {record.name: record for record in now}
    lost = []
    for record in before:
        if not record.digest or record.digest in known:
            continue
        here = names.get(record.name)
        if here is None:
            lost.append(f"shard {record.name} is missing")
        elif here.digest:  # or else it cannot be reached, as may be
            lost.append(f"shard {record.name} is another: it had {record.samples} samples, it has {here.samples}")
    old = {record.digest for record in before}
    added = [record.name for record in now if record.digest not in old and record.name not in {r.name for r in before}]
    both = [[r.digest for r in some if r.digest in known & old] for some in (before, now)]
    if not lost and both[0] != both[1]:
        lost.append("the shards are in another order")
    new = [f"{len(added)} shards are new, {added[0]} among them: the order of samples is another"] if added else []
    return lost, new
