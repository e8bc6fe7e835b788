"""One run directory, one run: two that wrote to it would spoil each other's log and checkpoints."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mdm_models.errors import TrainingError
from mdm_models.processes import Processes

LOCK = ".lock"


@contextlib.contextmanager
def locked(run: Path, processes: Processes) -> Iterator[None]:
    """Make the run directory, and keep every other run out of it inside the block; every process must enter it.

    The leading process holds a lock on RUN/.lock, which names it. The system ends the lock with the process, however
    that ends; where the file system knows no locks (some of clusters), there is none. Raises TrainingError, on every
    process, if another run holds it or the directory cannot be written to.
    """
    with contextlib.ExitStack() as held:
        processes.agree(lambda: held.enter_context(_locked(run)) if processes.is_main else None)
        yield


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise TrainingError(f"out: cannot write to {run}: {error.strerror}") from None
    with file:
        try:
            # lockf, not flock: that would be held by the data workers too, which outlive a killed process for a while
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip() or "another process"
            raise TrainingError(f"out: {run} is in use by {who}; wait for it, or choose another directory") from None
        except OSError:  # no locks here
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
