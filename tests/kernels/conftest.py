"""Interpreted kernels compute exponentials, roots and quotients as roughly as a GPU does; on a GPU, the first failure
of each process is told from those that may only follow from it."""

import pytest

from mdm_kernels import backend, plans

_first_failures: dict[str, str] = {}


def pytest_runtest_logreport(report):
    if report.failed:
        _first_failures.setdefault(getattr(report, "worker_id", "the process"), report.nodeid)


def pytest_terminal_summary(terminalreporter, config):
    """After an illegal access every later call of the same process fails, whatever it does."""
    if config.getoption("device") == "cpu" or not _first_failures:
        return
    terminalreporter.section("first failure of each process")
    terminalreporter.line("Look at these first: after an illegal memory access all later tests of its process fail.")
    for worker, test in sorted(_first_failures.items()):
        terminalreporter.line(f"{worker}: {test}")


@pytest.fixture(autouse=True)
def approximate_functions(request, monkeypatch):
    if request.config.getoption("device") == "cpu":
        from tests.kernels import gpu_functions  # not before Triton's interpreter is chosen

        gpu_functions.approximate(monkeypatch)


@pytest.fixture(autouse=True)
def no_plans():
    """A test may change what decides over launches."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def watched_addresses(request, monkeypatch):
    """Under the interpreter, a load or store outside the tensors that its kernel was given fails the test, even if what
    was read is dropped later; and so do an element that two programs write, and a masked load without `other`, whose
    other elements are undefined on a GPU and 0 in the interpreter."""
    if request.config.getoption("device") != "cpu":
        return
    from tests.kernels.watch import Watch  # not before Triton's interpreter is chosen

    watch = Watch()
    monkeypatch.setattr(backend, "launch", watch.watched_launch)
    monkeypatch.setattr(watch.builder, "create_masked_load", watch.watched_load)
    monkeypatch.setattr(watch.builder, "create_masked_store", watch.watched_store)
