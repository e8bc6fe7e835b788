"""A run in an object store, whose run directory on this machine is its mirror.

All is read and written in the mirror, at the speed of a disk; its files are copied to the store behind each checkpoint
and at the end. A checkpoint there counts when its manifest.json is there, which is sent last and deleted first: one
that was half sent, or half deleted, when a machine was lost is none. An empty mirror, on another machine, begins with
the newest checkpoint of the store and the log up to it.

Machines that share no folder have a mirror each. That of the leading process has the run but for the parts of
checkpoints that others write; these are in theirs. All parts are in the store alone, from which every mirror is made
whole when the run begins.
"""

import contextlib
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from mdm_models.data.cache import cache_name, user_cache
from mdm_models.errors import CheckpointError
from mdm_models.processes import Processes, Sharing
from mdm_models.storage import sync, url_of, write_whole
from mdm_models.training.checkpoint.checkpoints import delete, folder_of, list_steps, step_of
from mdm_models.training.checkpoint.files import MANIFEST, Damaged, read_manifest, verified_manifest
from mdm_models.training.checkpoint.store import Store, StoreError
from mdm_models.training.config import TrainConfig, changed

MARK = ".run"  # tells one run from the next at the same URL
SENT = ".sent.json"  # in the mirror: name → [time of change, bytes] of what was sent last


def mirrored(config: TrainConfig) -> TrainConfig:
    """Give the same settings with the mirror for `out`, if that is a URL."""
    if not (url := url_of(config.out)):
        return config
    folder = Path(config.data.cache) if config.data.cache else user_cache()
    return changed(config, out=str(folder / "runs" / cache_name(url.rstrip("/"))))


class Remote:
    """The store's side of a run. mirror: this process's; keep: how many checkpoints are kept there; sharing: who has
    the same mirror."""

    def __init__(self, url: str, mirror: Path, keep: int, sharing: Sharing):
        self.store, self.mirror, self.keep, self.sharing = Store(url), mirror, keep, sharing

    def begin(self, processes: Processes) -> None:
        """Bring every mirror to where the run is, before anybody looks for checkpoints; every process calls this.

        Raises StoreError if the store cannot be written to, or if the leading process's mirror is of a run that is not
        there any more; CheckpointError if every checkpoint there is damaged and that mirror has none.
        """
        processes.agree(lambda: self._drop_parts() if self.sharing.keeps else None)
        processes.agree(lambda: self._begin() if processes.is_main else None)
        if not self.sharing.is_of_all:
            self._put_newest(processes)
            newest = processes.agree(lambda: [path.name for path in list_steps(self.mirror)[-1:]])[0]
            processes.agree(lambda: [self._copy(name) for name in newest] if self.sharing.keeps else None)

    def _drop_parts(self) -> None:
        """Delete checkpoints of which this mirror has only what was written on this machine."""
        for path in list_steps(self.mirror):
            with contextlib.suppress(CheckpointError):  # a damaged one is passed over later, and named
                files = read_manifest(path)["files"] if (path / MANIFEST).exists() else [MANIFEST]
                if not all((path / name).exists() for name in files):
                    delete(path)

    def _begin(self) -> None:
        if re.match("hf://(?!buckets/)", self.store.url):
            warnings.warn(
                f"out: {self.store.url} is in a git repository: each file sent is a commit, of which the Hub takes so "
                "many an hour, and its history keeps what is deleted; a bucket, hf://buckets/OWNER/NAME/…, does not",
                stacklevel=2,
            )
        path = self.mirror / MARK
        there, here = self.store.read(MARK), path.read_bytes() if path.exists() else None
        if here not in (None, there):
            raise StoreError(
                f"out: {self.store.url} does not hold the run that was mirrored in {self.mirror}; delete that folder, "
                f"or, to go on with that run, copy it to {self.store.url}, {MARK} included"
            )
        mark = there or uuid.uuid4().hex.encode()
        self.store.write(MARK, mark)  # which shows at once whether that is allowed
        write_whole(path, lambda partial: partial.write_bytes(mark))
        self._fetch_newest()

    def upload(self, checkpoint: Path, processes: Processes) -> None:
        """Send a checkpoint that was written, and what else is new; every process calls this, and sends its share.

        A store that fails is warned of, and the training goes on: what is missing there is sent by a later call.
        """
        try:
            self._put_checkpoint(checkpoint, processes)
        except StoreError as error:
            if processes.is_main:
                warnings.warn(f"{error}; the training goes on, and {checkpoint.name} is in {self.mirror}", stacklevel=2)

    def finish(self, processes: Processes) -> None:
        """Send all that is new; every process calls this. Raises StoreError, on each of them, if that fails."""
        try:
            self._put_newest(processes)
            processes.agree(lambda: self._put_rest() if processes.is_main else None)
        except StoreError as error:
            raise StoreError(f"{error}; all of the run is in {self.mirror}: the same command sends it") from None

    def _put_newest(self, processes: Processes) -> None:
        """Send the newest checkpoint that the leading process has, if it is not there."""
        missing = processes.agree(lambda: self._missing() if processes.is_main else [])[0]
        for name in missing:
            self._put_checkpoint(folder_of(self.mirror) / name, processes)

    def _missing(self) -> list[str]:
        there = self._steps()
        return [path.name for path in list_steps(self.mirror)[-1:] if MANIFEST not in there.get(path.name, [])]

    def _put_checkpoint(self, checkpoint: Path, processes: Processes) -> None:
        place = f"checkpoints/{checkpoint.name}"
        files = processes.agree(lambda: sorted(read_manifest(checkpoint)["files"]) if processes.is_main else [])[0]
        here = files if self.sharing.is_of_all else [name for name in files if (checkpoint / name).exists()]

        def leading(work: Callable[[], None]) -> None:
            processes.agree(lambda: work() if processes.is_main else None)

        leading(lambda: self.store.delete([f"{place}/{MANIFEST}"]))  # of one that was there before and is replaced
        found = processes.agree(lambda: self._put_files(checkpoint, self.sharing.share(here)))
        if lost := sorted({*files}.difference(*found)):
            raise StoreError(f"{checkpoint / lost[0]} cannot be sent to {self.store.url}: no machine has it")
        leading(self._put_rest)  # the log up to the checkpoint before that counts
        leading(lambda: self.store.put(checkpoint / MANIFEST, f"{place}/{MANIFEST}"))
        leading(lambda: self._delete_old(step_of(checkpoint)))

    def _put_files(self, checkpoint: Path, names: list[str]) -> list[str]:
        for name in names:
            self.store.put(checkpoint / name, f"checkpoints/{checkpoint.name}/{name}")
        return names

    def _put_rest(self) -> None:
        """Send what has changed of the mirror, checkpoints apart."""
        path = self.mirror / SENT
        sent = json.loads(path.read_text()) if path.exists() else {}
        for file in sorted(self.mirror.rglob("*")):
            name = file.relative_to(self.mirror).as_posix()
            if not name.startswith("checkpoints/") and not re.search(r"(^|/)\.", name) and file.is_file():
                found = file.stat()
                version = [found.st_mtime_ns, found.st_size]
                if sent.get(name) != version:
                    self.store.put(file, name)
                    sent[name] = version
        write_whole(path, lambda partial: partial.write_text(json.dumps(sent)))

    def _steps(self) -> dict[str, list[str]]:
        """Names of the checkpoints in the store, whole ones or not, oldest first → the files of each."""
        steps: dict[str, list[str]] = {}
        for name in self.store.names("checkpoints"):
            if found := re.fullmatch(r"checkpoints/(step-\d{8,})/([^/]+)", name):
                steps.setdefault(found[1], []).append(found[2])
        return dict(sorted(steps.items(), key=lambda item: step_of(Path(item[0]))))

    def _delete_old(self, newest: int) -> None:
        """Delete all but the newest `keep` up to this step, and what was half sent."""
        steps = self._steps()
        whole = [name for name, files in steps.items() if MANIFEST in files]
        kept = {name for name in whole if step_of(Path(name)) > newest}  # passed over when the run resumed
        kept |= set([name for name in whole if name not in kept][-self.keep :])
        for name in steps.keys() - kept:
            files = sorted(steps[name], key=lambda file: file != MANIFEST)
            self.store.delete([f"checkpoints/{name}/{file}" for file in files])

    def _fetch_newest(self) -> None:
        """Copy the newest whole checkpoint, and the files beside the checkpoints' folder, if the mirror has none as
        new."""
        here = max(map(step_of, list_steps(self.mirror)), default=-1)
        steps = self._steps()
        newer = [name for name, files in steps.items() if MANIFEST in files and step_of(Path(name)) > here]
        for name in reversed(newer):
            try:
                return self._fetch(name, steps[name])
            except Damaged as error:
                place = f"{self.store.url}/checkpoints/{name}"
                warnings.warn(f"checkpoint {place} is damaged: {error}; trying the one before it", stacklevel=2)
        if newer and here < 0:
            raise CheckpointError(f"every checkpoint in {self.store.url} is damaged; delete them to start over")

    def _copy(self, name: str) -> None:
        """Have a whole copy of a checkpoint of the store in this mirror."""
        path = folder_of(self.mirror) / name / MANIFEST
        if path.exists() and path.read_bytes() == self.store.read(f"checkpoints/{name}/{MANIFEST}"):
            return  # nothing is missing there, after `_drop_parts`
        try:
            self._fetch(name, self._steps()[name], beside=False)
        except Damaged as error:
            raise CheckpointError(
                f"checkpoint {self.store.url}/checkpoints/{name} is damaged: {error}; delete it to go on from the one "
                "before it"
            ) from None

    def _fetch(self, name: str, files: list[str], beside: bool = True) -> None:
        """Copy a checkpoint into the mirror. beside: also the files beside the folder of checkpoints."""
        final = folder_of(self.mirror) / name
        partial = final.with_name(f".partial-{name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in files:
            self.store.get(f"checkpoints/{name}/{file}", partial / file)
        verified_manifest(partial)
        for file in self.store.names() if beside else []:
            if "/" not in file and not file.startswith("."):
                self.store.get(file, self.mirror / file)
        if final.exists():
            delete(final)
        partial.rename(final)
        sync(final.parent)
