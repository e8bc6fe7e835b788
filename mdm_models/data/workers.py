"""Processes that read and decode samples, and hand batches over in shared memory.

Each process has ROWS of one piece of memory, made before it starts, and fills them in turn. A new piece for each batch,
which is torch's way, took 0.16 of 0.85 ms for a picture of 256²: the system clears its pages, and maps them one by one.

Want of that memory, of which containers have little, is told before anything is read, and whatever keeps a process from
going on to the one that waits for it.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from mdm_models.errors import DataError

ROOM = "room in /dev/shm (docker run --shm-size), open files (ulimit -n) and processes (ulimit -u)"
AHEAD = 2  # a process is asked for its batch n + AHEAD when batch n is taken from it
ROWS = AHEAD + 1  # as batch n may not have been copied yet when it begins with that

Made = TypeVar("Made")
Collate = Callable[[list], tuple[Sequence[Tensor], Callable[[Tensor], Made]]]
"""gives the images of a batch's items, and what makes the batch of them once they are one tensor, to be pickled"""


def loaded(
    dataset: Dataset,
    batches: Iterable[list[int]],
    shape: Sequence[int],
    workers: int,
    collate: Collate[Made],
    pin: bool = False,
) -> Iterator[Made]:
    """Yield what `collate` makes of the items of each batch, read by so many processes; 0: by this one.

    shape: of the images of a full batch, which are uint8; a batch may have fewer. pin: put them in page-locked memory.
    Raises DataError where a process cannot be started, is killed, or cannot go on.
    """
    try:
        if workers:
            _check_room(workers)
        rows = _Rows(collate, workers, shape) if workers else None
        loader = DataLoader(
            dataset,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]: any iterable will do
            num_workers=workers,
            collate_fn=rows.fill if rows else collate,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=rows.begin if rows else None,
            generator=torch.Generator(),  # or else it would draw from the one that training draws dropout from
        )
        items = iter(loader)
    except OSError as error:
        raise DataError(f"data: {workers} --workers cannot be started: {error.strerror}; they need {ROOM}") from None
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise anywhere in a step when a process dies; without it, waiting for data finds out
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            item = next(items, None)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            if isinstance(error, RuntimeError) and (not workers or "Original Traceback" in str(error)):
                raise  # of our own code
            *_, reason = str(error).strip().splitlines() or [type(error).__name__]  # the last line of a traceback
            reason = reason.removeprefix(f"{type(error).__name__}: ")
            if isinstance(error, ConnectionError | EOFError):  # it was killed while it handed something over
                reason, error = f"DataLoader worker was lost: {reason}", RuntimeError()
            remedy = "if memory was short, fewer --workers need less" if isinstance(error, RuntimeError) else ""
            raise DataError("; ".join(filter(None, [f"data: {reason}", remedy]))) from None
        if item is None:
            return
        found, make = item
        images = rows.memory[found] if rows else _stacked(found, torch.empty(shape, dtype=torch.uint8))
        yield make(images.pin_memory() if pin else images.clone() if rows else images)


def _check_room(workers: int) -> None:
    """Raise OSError if there is no room for the queues between so many processes: torch, half way through making them,
    would print a traceback as well."""
    context = multiprocessing.get_context()
    [context.Queue() for _ in range(2 * workers + 2)]


class _Rows(Generic[Made]):
    """Shared memory for ROWS batches of each process. Raises OSError if there is none."""

    def __init__(self, collate: Collate[Made], workers: int, shape: Sequence[int]):
        self.collate = collate
        self.worker = self.filled = 0  # in a process that decodes: which it is, and how many batches it has made
        size = workers * ROWS * math.prod(shape)
        try:
            self.memory = torch.empty(workers, ROWS, *shape, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            *_, reason = str(error).splitlines()
            raise OSError(None, f"no {size / 1e6:.3g} MB of shared memory: {reason}") from None

    def begin(self, worker: int) -> None:
        self.worker = worker
        _stand_apart()

    def fill(self, items: list) -> tuple[tuple[int, int, slice], Callable[[Tensor], Made]]:
        """Put the images of some items into the next row; → where they are in `memory`, and what makes a batch."""
        images, make = self.collate(items)
        row = self.filled % ROWS
        self.filled += 1
        _stacked(images, self.memory[self.worker, row])
        return (self.worker, row, slice(len(images))), make


def _stacked(images: Sequence[Tensor], memory: Tensor) -> Tensor:
    """Stack images in memory for so many or more."""
    return torch.stack(tuple(images), out=memory[: len(images)]) if images else memory[:0]


def _stand_apart() -> None:
    """Take a worker out of its parent's process group, all of which Ctrl-C and torchrun signal: workers must live until
    their parent has saved, which then ends them by SIGTERM, whose handler they must not inherit."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's warning to all processes, which only the parent heeds
