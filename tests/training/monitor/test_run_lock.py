import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mdm_models.errors import TrainingError
from mdm_models.processes import Processes, Sharing
from mdm_models.training.monitor import run_lock
from mdm_models.training.monitor.run_lock import locked, locked_mirror

HERE = Processes(0, 1, torch.device("cpu"))


def enter(run: Path, processes: Processes = HERE) -> None:
    with locked(run, processes):
        pass


def hold(run: Path, told: Connection) -> None:
    """A run with one data worker, of which it tells the process id."""
    with locked(run, HERE):
        worker = os.fork()
        if worker:
            told.send(worker)
        time.sleep(60)


@pytest.fixture
def other_run() -> Iterator[Callable[[Path], int]]:
    """other_run(directory) holds the directory in another process, until the test ends; → its process id."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(run: Path) -> int:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=hold, args=(run, sender))
        process.start()
        assert receiver.poll(30)
        processes.extend([process.pid, receiver.recv()])
        return process.pid

    yield start
    for process in processes:
        os.kill(process, signal.SIGKILL)


def test_a_directory_in_use_is_refused_and_its_user_named(tmp_path, other_run):
    number = other_run(tmp_path / "run")
    with pytest.raises(TrainingError, match=rf"run is in use by process {number} on .*choose another") as error:
        enter(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_killed_run_holds_it_no_more_though_its_data_workers_live(tmp_path, other_run):
    number = other_run(tmp_path / "run")
    os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            return enter(tmp_path / "run")
        except TrainingError:  # the signal takes a moment
            time.sleep(0.01)
    pytest.fail("the directory is still held")


def test_a_run_that_ended_holds_it_no_more(tmp_path, other_run):
    enter(tmp_path / "run")
    other_run(tmp_path / "run")


def test_a_process_that_does_not_lead_learns_that_it_is_refused(tmp_path):
    class Follower(Processes):
        def agree(self, work) -> list:
            work()
            raise TrainingError("out: in use")  # by the leading one

    with pytest.raises(TrainingError, match="in use"):
        enter(tmp_path / "run", Follower(1, 2, HERE.device))


TEXT = "process 7 on node-a\n1234\n"


class Elsewhere(Processes):
    """Rank 1, whose leader has written TEXT into its lock."""

    def agree(self, work) -> list:
        return [TEXT, work()]


@pytest.mark.parametrize("other", [None, "process 7 on node-a\n5678\n"], ids=["no directory", "one of its own"])
def test_a_machine_that_does_not_see_the_leaders_directory_is_named(tmp_path, monkeypatch, other):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    if other:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / run_lock.LOCK).write_text(other)
    with pytest.raises(TrainingError, match=r"rank 1 on .* does not see .*run of process 7 on node-a; all") as error:
        enter(tmp_path / "run", Elsewhere(1, 2, HERE.device))
    assert "\n" not in str(error.value)


def test_a_machine_that_does_not_see_the_leaders_mirror_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    with locked_mirror(tmp_path / "run", Elsewhere(1, 2, HERE.device)) as (mirror, sharing):
        assert (mirror, sharing) == (tmp_path / "run.rank-1", Sharing(0, 1, 2))
        assert "process" in (mirror / run_lock.LOCK).read_text()


def test_a_machine_that_sees_it_after_a_while_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    threading.Timer(0.3, lambda: (tmp_path / "run" / run_lock.LOCK).write_text(TEXT)).start()
    enter(tmp_path / "run", Elsewhere(1, 2, HERE.device))
