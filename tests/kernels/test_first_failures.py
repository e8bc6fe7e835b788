"""The first failure of each process is told apart."""

from types import SimpleNamespace

import pytest

from tests.kernels import conftest


class Terminal:
    def __init__(self):
        self.lines = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    line = section


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_the_first_failure_of_a_worker_is_listed_and_only_on_a_gpu(device, monkeypatch):
    monkeypatch.setattr(conftest, "_first_failures", {})
    for worker, test, failed in [("gw1", "a", False), ("gw1", "b", True), ("gw0", "c", True), ("gw1", "d", True)]:
        conftest.pytest_runtest_logreport(SimpleNamespace(failed=failed, worker_id=worker, nodeid=test))
    terminal = Terminal()
    conftest.pytest_terminal_summary(terminal, SimpleNamespace(getoption=lambda name: device))
    assert [line for line in terminal.lines if line[0] in "gw"] == (["gw0: c", "gw1: b"] if device == "cuda" else [])
