"""The mirror of a run and its store, whatever is lost of either."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from mdm_models.data import locations
from mdm_models.errors import CheckpointError
from mdm_models.processes import ALONE, Sharing
from mdm_models.training.checkpoint.checkpoints import Checkpoints, list_steps
from mdm_models.training.checkpoint.remote import Remote
from mdm_models.training.checkpoint.store import Store, StoreError
from tests.training.fault_processes import IDENTITY, flat_state, is_of_one_step

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """An empty store that is not waited for."""
    monkeypatch.setattr(locations, "WAITS", ())
    monkeypatch.setattr(locations, "_given_up", {})
    yield Store(URL)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def failing(monkeypatch) -> list[str]:
    """What is put into the store fails while this list has a part of its name."""
    parts = []

    def put(self, file, name, put=Store.put):
        if any(part in name for part in parts):
            raise StoreError(f"{self.url} cannot be written to: no network")
        put(self, file, name)

    monkeypatch.setattr(Store, "put", put)
    return parts


@pytest.fixture
def machine(tmp_path) -> Callable[..., "Machine"]:
    """machine("a") begins the run on a machine of that name, which keeps its mirror."""
    return lambda name, keep=3: Machine(tmp_path / name, keep)


class Machine:
    """Goes on with the run in the store; `step` is where it was, 0 for none."""

    def __init__(self, mirror: Path, keep: int):
        mirror.mkdir(exist_ok=True)
        self.mirror, self.remote = mirror, Remote(URL, mirror, keep, Sharing.of_all(ALONE))
        self.remote.begin(ALONE)
        self.checkpoints = Checkpoints(mirror, IDENTITY, keep, ALONE, upload=self.remote.upload)
        state = flat_state(0)
        self.checkpoints.load_newest(state)
        assert is_of_one_step(state)
        self.step = state["counters"]["step"]

    def save(self, *steps: int) -> "Machine":
        for step in steps:
            with (self.mirror / "log.jsonl").open("a") as log:
                log.write(f"{step}\n")
            self.checkpoints.save(step, flat_state(step))
        self.checkpoints.finish()
        return self


def step(number: int) -> str:
    return f"checkpoints/step-{number:08d}"


def steps_in(store: Store) -> dict[int, bool]:
    """The checkpoints in the store and whether they count."""
    names = store.names("checkpoints")
    return {int(name.split("/")[1][5:]): f"{name.rsplit('/', 1)[0]}/manifest.json" in names for name in names}


def test_another_machine_goes_on_with_the_newest_checkpoint_and_its_log(machine):
    machine("a").save(1, 2)
    moved = machine("b")
    assert moved.step == 2
    assert [path.name for path in list_steps(moved.mirror)] == ["step-00000002"]
    assert (moved.mirror / "log.jsonl").read_text() == "1\n2\n"


def test_a_machine_that_is_behind_goes_on_from_the_store(machine):
    machine("a").save(1)
    machine("b").save(2)
    behind = machine("a")
    assert behind.step == 2
    assert (behind.mirror / "log.jsonl").read_text() == "1\n2\n"


def test_a_machine_that_is_ahead_reads_nothing_and_sends_what_is_missing(machine, store, failing, monkeypatch):
    failing.append(step(2))
    with pytest.warns(UserWarning, match="no network"):
        machine("a").save(1, 2)
    failing.clear()
    monkeypatch.setattr(Store, "get", None)
    ahead = machine("a")
    assert ahead.step == 2
    ahead.remote.finish(ALONE)
    assert steps_in(store) == {1: True, 2: True}


def test_only_the_newest_are_kept(machine, store):
    machine("a", keep=2).save(1, 2, 3)
    assert steps_in(store) == {2: True, 3: True}


def test_a_checkpoint_without_its_manifest_is_none_and_is_removed(machine, store):
    machine("a").save(1, 2, 3)
    store.delete([f"{step(3)}/manifest.json"])
    moved = machine("b")
    assert moved.step == 2
    moved.save(4)
    assert steps_in(store) == {1: True, 2: True, 4: True}


def test_a_checkpoint_is_no_longer_one_while_it_is_replaced(machine, store, failing):
    machine("a").save(1, 2)
    store.write(f"{step(2)}/__0_0.distcp", b"spoilt")
    failing.append("manifest.json")
    with pytest.warns(UserWarning, match="damaged|no network"):
        machine("b").save(2)
    assert steps_in(store) == {1: True, 2: False}


def test_the_manifest_is_sent_last_and_behind_the_log(machine, monkeypatch):
    sent = []
    monkeypatch.setattr(Store, "put", lambda self, file, name: sent.append(name))
    machine("a").save(1)
    assert sent[-2:] == ["log.jsonl", f"{step(1)}/manifest.json"]
    assert sorted(sent[:-2]) == [f"{step(1)}/.metadata", f"{step(1)}/__0_0.distcp"]


def test_only_what_has_changed_is_sent_again(machine, monkeypatch):
    first = machine("a")
    for name in ("samples/1.webp", ".lock", "model/.config.json.partial-1"):
        (first.mirror / name).parent.mkdir(exist_ok=True)
        (first.mirror / name).write_bytes(b"")
    sent = []
    monkeypatch.setattr(Store, "put", lambda self, file, name: sent.append(name))
    first.save(1)
    machine("a").save(2)
    assert sent.count("samples/1.webp") == 1
    assert sent.count("log.jsonl") == 2
    assert {name for name in sent if not name.startswith("checkpoints")} == {"samples/1.webp", "log.jsonl"}


def test_a_damaged_checkpoint_is_passed_over_and_named(machine, store):
    machine("a").save(1, 2)
    store.write(f"{step(2)}/__0_0.distcp", b"something else")
    with pytest.warns(UserWarning, match=f"{URL}/{step(2)} is damaged: .*; trying the one before it"):
        assert machine("b").step == 1
    store.write(f"{step(1)}/__0_0.distcp", b"something else")
    every = pytest.raises(CheckpointError, match=f"every checkpoint in {URL} is damaged")
    with pytest.warns(UserWarning, match="damaged"), every:
        machine("c")


def test_a_checkpoint_of_which_only_a_part_was_written_here_is_fetched(machine):
    mirror = machine("a").save(1, 2).mirror
    for path in list_steps(mirror):
        (path / "__0_0.distcp").unlink()
    again = machine("a")
    assert again.step == 2
    assert [path.name for path in list_steps(mirror)] == ["step-00000002"]


def test_a_checkpoint_whose_parts_are_on_no_machine_does_not_come_to_count(machine, store):
    lost = machine("a").save(1)
    store.delete([f"{step(1)}/manifest.json"])
    (list_steps(lost.mirror)[0] / "__0_0.distcp").unlink()
    apart = Remote(URL, lost.mirror, 3, Sharing(0, 1, 2))
    with pytest.raises(StoreError, match=r"step-00000001/__0_0.distcp cannot be sent to .*: no machine has it"):
        apart.finish(ALONE)
    assert steps_in(store) == {1: False}


def test_an_upload_that_fails_is_warned_of_and_the_next_one_is_sent(machine, store, failing):
    failing.append(step(1))
    with pytest.warns(UserWarning, match=r"no network; the training goes on, and step-00000001 is in .*/a$"):
        machine("a").save(1, 2)
    assert steps_in(store) == {2: True}


def test_a_store_that_fails_to_the_end_is_an_error_that_says_where_the_run_is(machine, failing):
    failing.append("log.jsonl")
    with pytest.warns(UserWarning, match="no network"):
        failed = machine("a").save(1)
    message = f"{URL} cannot be written to: no network; all of the run is in {failed.mirror}: the same command sends it"
    with pytest.raises(StoreError, match=re.escape(message)):
        failed.remote.finish(ALONE)


def test_a_store_that_cannot_be_written_to_is_found_out_at_the_start(machine, monkeypatch):
    def pipe_file(*arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", pipe_file)
    with pytest.raises(StoreError, match=f"{URL} cannot be written to: Access Denied"):
        machine("a")


def test_a_mirror_of_a_run_that_is_not_in_the_store_any_more_is_refused(machine, store):
    mirror = machine("a").save(1).mirror
    store.delete(store.names())
    message = f"{URL} does not hold the run that was mirrored in {mirror}; delete that folder"
    with pytest.raises(StoreError, match=re.escape(message)):
        machine("a")
    machine("b").save(2)  # another run
    with pytest.raises(StoreError, match=re.escape(message)):
        machine("a")
    shutil.rmtree(mirror)
    assert machine("a").step == 2


def test_a_run_copied_into_the_store_is_gone_on_with(machine, store, tmp_path):
    copied = Checkpoints(tmp_path, IDENTITY, 3, ALONE)
    copied.save(5, flat_state(5))
    copied.finish()
    for file in list_steps(tmp_path)[0].iterdir():
        store.put(file, f"{step(5)}/{file.name}")
    assert machine("a").step == 5


def test_saving_does_not_wait_for_the_upload_before(tmp_path):
    free = threading.Event()
    of_run = Checkpoints(tmp_path, IDENTITY, 3, ALONE, upload=lambda path, processes: free.wait(60))
    of_run.save(1, flat_state(1))
    of_run.save(2, flat_state(2))
    assert len(list_steps(tmp_path)) == 1  # and the writing of the second waits
    free.set()
    of_run.finish()
    assert len(list_steps(tmp_path)) == 2
    assert json.loads((list_steps(tmp_path)[1] / "manifest.json").read_text())
