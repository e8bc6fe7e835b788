"""A folder of WebDataset shards that can be stopped at any instant and gone on with.

    OUT/00000.tar …          the shards, each there whole or not at all
    OUT/reports/00000.json   what a finished shard holds and what was skipped, by name; written after its tar
    OUT/settings.json        what the shards were made with
    OUT/report.json          the sum of the reports

Which samples belong to a shard is fixed by their numbers, not by which of them turn out to be usable, so a shard with
skipped samples is smaller, and no shard depends on another one. A shard whose tar is deleted is made again.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm
from webdataset.writer import TarWriter

from mdm_models.data.media import BadSample
from mdm_models.storage import SETTINGS_FILE, begin, naming, write_whole

REPORT = "report.json"
Item = TypeVar("Item")
Files = dict[str, bytes]  # of one sample: suffix → content


class ShardFolder:
    """The shards of one data set in the folder `out`, which is made if need be.

    settings: whatever decides what the shards hold, as JSON knows it. Raises ValueError if `out` holds shards that were
    made with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, object]):
        self.out = out
        self.reports = out / "reports"
        self.settings = settings
        self.written = 0  # samples, by the last summary
        if not (out / SETTINGS_FILE).exists() and any(out.glob("*.tar")):
            raise ValueError(f"{out} holds shards of unknown origin; choose another --out")
        begin(out, settings)
        self.reports.mkdir(exist_ok=True)

    def write(
        self,
        items: Iterable[tuple[str, Item]],
        make: Callable[[Item], Files],
        *,
        per_shard: int,
        workers: int,
        total: int,
        unit: str,
        prefix: str = "",
    ) -> None:
        """Write the shards that are not there yet: item i goes to shard i // per_shard, in the order of the items.

        items: the key of each sample and what it is made of; make: called in `workers` threads, raises BadSample for
        a sample to skip. What else `make` raises ends the writing, as a full disk does; finished shards stay.
        Raises ValueError if another process is writing to the folder.
        """
        pool = ThreadPoolExecutor(workers)
        pending: dict[Future, tuple[_OpenShard, int]] = {}
        try:
            with naming(self.out), self._alone(), tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) as bar:
                for number, group in enumerate(_groups(items, per_shard)):
                    name = f"{prefix}{number:05d}"
                    if self._is_done(name):
                        bar.update(len(group))
                        continue
                    shard = _OpenShard(self, name, [key for key, _ in group])
                    for position, (_, item) in enumerate(group):
                        pending[pool.submit(make, item)] = shard, position
                        if len(pending) == 2 * workers:  # enough to keep all threads busy; more would fill memory
                            _collect(pending, bar)
                while pending:
                    _collect(pending, bar)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes out of the folder, and clears away what a killed one has left."""
        try:
            held = FileLock(self.out / ".lock").acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing to {self.out}; wait for it or choose another --out") from None
        with held:
            for partial in self.out.glob(".*.partial-*"):
                partial.unlink()
            yield

    def _is_done(self, name: str) -> bool:
        report = self.reports / f"{name}.json"
        told = _read_json(report)
        return _is_report(told) and ((self.out / f"{name}.tar").exists() or told["written"] == 0)

    def summary(self) -> str:
        """What all shards hold, for the eye; also written to report.json."""
        shards = written = 0
        skipped: Counter[str] = Counter()
        for path in sorted(self.reports.glob("*.json")):
            report = _read_json(path)
            if not _is_report(report):
                continue  # a foreign file
            shards += report["written"] > 0
            written += report["written"]
            skipped.update({reason: len(named) for reason, named in report["skipped"].items()})
        self.written = written
        counts = dict(skipped.most_common())
        _write_json(
            self.out / REPORT,
            {"settings": self.settings, "shards": shards, "written": written, "skipped": counts},
        )
        lines = [f"{self.out}: {written} samples in {shards} shards, {skipped.total()} skipped"]
        lines += [f"{count:10d}  {reason}" for reason, count in counts.items()]
        if counts:
            lines.append(f"each is named in {self.reports}")
        return "\n".join(lines)


class _OpenShard:
    """A shard whose samples arrive in any order; its tar has them in the order of their keys.

    The samples lie in an unnamed temporary file meanwhile: a slow download holds up neither the threads nor the memory.
    """

    def __init__(self, folder: ShardFolder, name: str, keys: list[str]):
        self.folder = folder
        self.name = name
        self.keys = keys
        self.spool = tempfile.TemporaryFile(dir=folder.out)  # noqa: SIM115 — closed by `_write`
        self.places: dict[int, list[tuple[str, int, int]]] = {}  # position → suffix, first byte, number of bytes
        self.skipped: dict[int, BadSample] = {}

    def add(self, position: int, made: Future) -> None:
        """Take the sample at `position`; the last one to come has the shard written."""
        try:
            files = made.result()
        except BadSample as bad:
            self.skipped[position] = bad
        else:
            self.places[position] = []
            for suffix, data in files.items():
                self.places[position].append((suffix, self.spool.tell(), len(data)))
                self.spool.write(data)
        if len(self.places) + len(self.skipped) == len(self.keys):
            self._write()

    def _write(self) -> None:
        if self.places:
            write_whole(self.folder.out / f"{self.name}.tar", self._write_tar)
        skipped: dict[str, list[list[str]]] = {}
        for position, bad in sorted(self.skipped.items()):
            skipped.setdefault(bad.reason, []).append([self.keys[position], bad.detail])
        report = {"written": len(self.places), "skipped": skipped}
        _write_json(self.folder.reports / f"{self.name}.json", report)
        self.spool.close()

    def _write_tar(self, path: Path) -> None:
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for position in sorted(self.places):
                tar.write({"__key__": self.keys[position]} | {s: self._read(*p) for s, *p in self.places[position]})

    def _read(self, first: int, count: int) -> bytes:
        self.spool.seek(first)
        return self.spool.read(count)


def _collect(pending: dict[Future, tuple[_OpenShard, int]], bar: tqdm) -> None:
    """Give what is finished to its shards; waits until something is."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        shard, position = pending.pop(future)
        shard.add(position, future)
        bar.update()


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while group := list(itertools.islice(remaining, size)):
        yield group


def _write_json(path: Path, value: object) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n"))


def _read_json(path: Path) -> object:
    """None if there is no such file, or none of JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _is_report(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and isinstance(value.get("written"), int) and isinstance(value.get("skipped"), dict)
