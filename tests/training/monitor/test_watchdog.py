"""Processes that fall silent, and what the others do."""

import os
import signal
import socket
import time

import pytest

from mdm_models.errors import COME_AGAIN
from tests import forked
from tests.training import fault_processes as processes

PATIENCE = 3.0


@pytest.fixture(scope="module")
def context():
    return forked.context()


@pytest.fixture
def three(context, tmp_path):
    """three() starts three processes that watch each other until they are told to leave; ends those that are left."""
    started = []

    def start() -> list:
        port = forked.free_port()
        for rank in range(3):
            started.append(context.Process(target=processes.watch, args=(rank, 3, tmp_path, port, PATIENCE)))
            started[-1].start()
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("watching-*"))) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(list(tmp_path.glob("watching-*"))) == 3
        return started

    yield start
    for process in started:
        process.kill()


def said(folder, rank: int) -> str:
    return (folder / f"said-{rank}").read_text()


@pytest.mark.parametrize("silent", [0, 2])
@pytest.mark.parametrize(("how", "found"), [(signal.SIGKILL, "has gone"), (signal.SIGSTOP, "silent for 3 s")])
def test_all_end_and_name_the_process_that_was_killed_or_frozen(three, tmp_path, silent, how, found):
    members = three()
    os.kill(members[silent].pid, how)
    others = [rank for rank in range(3) if rank != silent]
    for rank in others:
        members[rank].join(60)
        assert members[rank].exitcode == COME_AGAIN
        [line] = said(tmp_path, rank).splitlines()
        assert line.startswith(f"error: rank {silent} on {socket.gethostname()} {found}; rank {rank} on ")


def test_a_collective_that_fails_for_a_process_that_has_gone_is_said_in_one_line(three, tmp_path):
    members = three()
    os.kill(members[1].pid, signal.SIGKILL)
    (tmp_path / "raise-0").touch()  # as gloo does when its own connection is closed
    members[0].join(60)
    assert members[0].exitcode == COME_AGAIN
    [line] = said(tmp_path, 0).splitlines()
    assert f"rank 1 on {socket.gethostname()} has gone" in line


def test_those_that_leave_in_good_order_are_not_missed(three, tmp_path):
    members = three()
    for rank in (1, 0, 2):
        (tmp_path / f"leave-{rank}").touch()
        members[rank].join(60)
        assert members[rank].exitcode == 0
        time.sleep(PATIENCE if rank != 2 else 0)  # for which those that are left wait
    assert [said(tmp_path, rank) for rank in range(3)] == ["", "", ""]
