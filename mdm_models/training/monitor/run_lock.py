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
from mdm_models.processes import Processes, Sharing

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


@contextlib.contextmanager
def locked_mirror(mirror: Path, processes: Processes) -> Iterator[tuple[Path, Sharing]]:
    """Lock, as `locked` does, the mirror of a run in a store, which machines may share or have to themselves; → this
    process's mirror, and who shares it.

    A machine that does not see the leading process's has one beside it, named after the first rank there: never the
    same folder, however slow a file system is to show it.
    """
    with contextlib.ExitStack() as held:
        holder, *_ = processes.agree(lambda: held.enter_context(_locked(mirror)) if processes.is_main else "")
        first = None if processes.is_main or _sees(mirror, holder) else _first_here(processes)
        same = [rank for rank, other in enumerate(processes.agree(lambda: first)) if other == first]
        sharing = Sharing(same.index(processes.rank), len(same), processes.world_size)
        if first is not None:
            mirror = mirror.with_name(f"{mirror.name}.rank-{first}")
        mine = sharing.keeps and not processes.is_main
        processes.agree(lambda: held.enter_context(_locked(mirror)) if mine else "")
        yield mirror, sharing


def _first_here(processes: Processes) -> int:
    """The first rank on this machine."""
    return processes.rank - int(os.environ.get("LOCAL_RANK", "0"))


def _see(run: Path, holder: str, processes: Processes) -> None:
    """Raise TrainingError if this process does not see the run directory in which the leading one left this text."""
    if processes.is_main or _sees(run, holder):
        return
    raise TrainingError(
        f"out: rank {processes.rank} on {socket.gethostname()} does not see {run} of {_name(holder)}; all machines of "
        "a run need the same folder there, on storage that they share"
    )


def _sees(run: Path, holder: str) -> bool:
    """Whether the leading process's lock is here, or comes to be seen. It must not look itself: to close the file would
    end its lock."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if (run / LOCK).read_text() == holder:
                return True
        time.sleep(0.1)
    return False


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
