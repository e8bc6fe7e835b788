"""One run directory, one run: two that wrote to it would spoil each other's log and checkpoints."""

import contextlib
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from mdm_models.errors import TrainingError
from mdm_models.processes import Processes

LOCK = ".lock"
PATIENCE = 5.0  # seconds until a network file system shows what another machine has written


@contextlib.contextmanager
def locked(run: Path, processes: Processes) -> Iterator[None]:
    """Make the run directory, and keep every other run out of it inside the block; every process must enter it.

    The leading process holds a lock on RUN/.lock, which names it. The system ends the lock with the process, however
    that ends; where the file system knows no locks (some of clusters), there is none. Raises TrainingError, on every
    process, if another run holds it, the directory cannot be written to, or one of them, on another machine, does not
    see it.
    """
    with contextlib.ExitStack() as held:
        holder, *_ = processes.agree(lambda: held.enter_context(_locked(run)) if processes.is_main else "")
        processes.agree(lambda: _see(run, holder, processes))
        yield


def _see(run: Path, holder: str, processes: Processes) -> None:
    """Raise TrainingError if this process does not see the run directory in which the leading one left this text."""
    if processes.is_main:  # and must not look: to close the file would end its lock
        return
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if (run / LOCK).read_text() == holder:
                return
        time.sleep(0.1)
    raise TrainingError(
        f"out: rank {processes.rank} on {socket.gethostname()} does not see {run} of {_name(holder)}; all machines of "
        "a run need the same folder there, on storage that they share"
    )


def _name(text: str) -> str:
    """Who holds a lock, by what is written in it."""
    return text.partition("\n")[0] or "another process"


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[str]:
    """→ what it has written into the lock: its name, and a line that is there in no other."""
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
            who = _name(file.read())
            raise TrainingError(f"out: {run} is in use by {who}; wait for it, or choose another directory") from None
        except OSError:  # no locks here
            pass
        text = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4()}\n"
        file.truncate(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        yield text
