"""A run on two machines, each a network namespace with an address and a mount table of its own: what is lost between
them, who notices, and that the same command goes on. docs/cluster.md has the table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "mdm_models" / "recipes" / "data"
PATIENCE = 10  # seconds
COME_AGAIN = 75
MACHINES = f"mdm-a-{os.getpid()}", f"mdm-b-{os.getpid()}"  # tests may run beside each other

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("ip") or os.geteuid() != 0, reason="namespaces need `ip`, of iproute2, and the superuser"
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def link() -> Iterator[None]:
    """Two machines, 10.77.0.1 and 10.77.0.2, and a cable between them."""
    try:
        for machine in MACHINES:
            ip("netns", "add", machine)
        ends = [word for machine in MACHINES for word in ("netns", machine)]
        ip("link", "add", "cable", ends[0], ends[1], "type", "veth", "peer", "name", "cable", ends[2], ends[3])
        for number, machine in enumerate(MACHINES, 1):
            ip("-n", machine, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", machine, "link", "set", device, "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces cannot be made here: {error.stderr}")
    finally:
        for machine in MACHINES:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", machine)


def plug(state: str) -> None:
    """The cable is plugged in ("up") or not ("down")."""
    ip("-n", MACHINES[1], "link", "set", "cable", state)


class Run:
    """One run of two processes, one on each machine, started again and again."""

    def __init__(self, out: Path):
        self.out = out
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, port: int, before_on_second: str = "true") -> "Run":
        quick = "--model mdm_t2i_tiny --frames 1 --size 32 --batch-size 2 --workers 0 --steps 1000000 --log-every 1"
        rare = "--save-every 20 --sample-every 0 --evaluate-every 0"
        options = f"--preset tiny {quick} {rare} --patience {PATIENCE} --out {self.out} --data {CLIPS}"
        train = f"{sys.executable} -m mdm_models.cli train t2v_webvid {options}"
        for rank, machine in enumerate(MACHINES):
            joining = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
            joining |= {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
            command = f"{before_on_second if rank else 'true'} && exec {train}"
            process = subprocess.Popen(
                ["ip", "netns", "exec", machine, "sh", "-c", command],
                env=os.environ | joining | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
        return self

    def steps(self) -> list[int]:
        """Those in the log."""
        with suppress(FileNotFoundError):
            lines = (self.out / "log.jsonl").read_text().splitlines()
            return [json.loads(line)["step"] for line in lines]
        return []

    def go_on_for(self, steps: int) -> "Run":
        """Wait until it has made so many more."""
        goal = self.last() + steps
        deadline = time.monotonic() + 120
        while self.last() < goal:
            assert time.monotonic() < deadline, "no steps"
            assert all(process.poll() is None for process in self.processes), self.ended()
            time.sleep(0.2)
        return self

    def last(self) -> int:
        return max(self.steps(), default=0)

    def ended(self, within: float = 120) -> list[tuple[int, str]]:
        """Exit code and last line of both processes, which end by themselves within so many seconds."""
        deadline = time.monotonic() + within
        try:
            found = []
            for process in self.processes:
                _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                found.append((process.returncode, re.split(r"[\r\n]+", said.strip())[-1]))
            return found
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()


@pytest.fixture
def run(link, tmp_path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    plug("up")
    run.end()


def test_without_a_shared_folder_both_end_at_the_start(run):
    run.out.mkdir()
    ended = run.start(29601, before_on_second=f"mount -t tmpfs none {run.out}").ended()
    assert [code for code, _ in ended] == [2, 2]
    assert all(re.search(r"out: rank 1 on \S+ does not see ", line) for _, line in ended)


def test_what_is_lost_is_noticed_within_the_patience_and_the_same_command_goes_on(run):
    run.start(29602).go_on_for(30)
    plug("down")
    time.sleep(PATIENCE / 2)
    plug("up")
    run.go_on_for(10)  # a link that comes back in time is not noticed

    plug("down")  # and one that does not by both, each of which names the other
    silent = [(COME_AGAIN, rf"error: rank {other} on \S+ silent for {PATIENCE} s") for other in (1, 0)]
    assert_ended(run.ended(within=PATIENCE + 10), silent)
    plug("up")

    run.start(29603).go_on_for(10)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    assert_ended(run.ended(within=PATIENCE), [(COME_AGAIN, r"error: rank 1 on \S+ has gone"), (-signal.SIGKILL, "")])

    run.start(29604).go_on_for(10)
    os.kill(run.processes[0].pid, signal.SIGSTOP)
    frozen = run.processes.pop(0)
    assert_ended(run.ended(within=PATIENCE + 10), [(COME_AGAIN, rf"error: rank 0 on \S+ silent for {PATIENCE} s")])
    frozen.kill()
    frozen.communicate()

    run.start(29605).go_on_for(10)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert [code for code, _ in run.ended()] == [COME_AGAIN, COME_AGAIN]
    assert run.steps() == list(range(1, run.last() + 1))  # the log has no gap, and nothing twice


def assert_ended(ended: list[tuple[int, str]], expected: list[tuple[int, str]]) -> None:
    """Each process has its exit code, and its last line contains the pattern."""
    assert [code for code, _ in ended] == [code for code, _ in expected]
    for (_, line), (_, pattern) in zip(ended, expected, strict=True):
        assert re.search(pattern, line), line
