"""Processes that read and decode samples, and hand batches over in shared memory.

Whatever keeps one of them from handing a batch over is told to the process that waits for it. torch's own would drop a
batch for which there is no room in /dev/shm, where containers have little, and be waited for without end.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from mdm_models.errors import DataError

ROOM = "room in /dev/shm (docker run --shm-size), open files (ulimit -n) and processes (ulimit -u)"


class HasImages(Protocol):
    @property
    def images(self) -> Tensor:
        """Its only tensor."""
        ...


Made = TypeVar("Made", bound=HasImages)


def loaded(
    dataset: Dataset, batches: Iterable[list[int]], workers: int, collate: Callable[[list], Made], pin: bool = False
) -> Iterator[Made]:
    """Yield what `collate` makes of the items of each batch, read by so many processes; 0: by this one.

    pin: call pin_memory() of it. Raises DataError where a process cannot be started, is killed, or cannot go on.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]: any iterable will do
        num_workers=workers,
        collate_fn=_Shared(collate) if workers else collate,
        pin_memory=pin,
        worker_init_fn=stand_apart,
        generator=torch.Generator(),  # or else it would draw from the one that training draws dropout from
    )
    try:
        if workers:
            _check_room(workers)
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
        yield item


def _check_room(workers: int) -> None:
    """Raise OSError if there is no room for the queues between so many processes: torch, half way through making them,
    would print a traceback as well."""
    context = multiprocessing.get_context()
    [context.Queue() for _ in range(2 * workers + 2)]


@dataclass(frozen=True)
class _Shared(Generic[Made]):
    """Has a batch in shared memory before torch's queue takes it, from a thread that none hears of."""

    collate: Callable[[list], Made]

    def __call__(self, items: list) -> Made:
        batch = self.collate(items)
        try:
            batch.images.share_memory_()
        except RuntimeError as error:
            *_, reason = str(error).splitlines()
            size = f"{batch.images.nbytes / 1e6:.3g} MB"
            raise OSError(f"a batch of {size} cannot be shared between processes: {reason}; they need {ROOM}") from None
        return batch


def stand_apart(worker: int) -> None:
    """Take a worker out of its parent's process group, all of which Ctrl-C and torchrun signal: workers must live until
    their parent has saved, which then ends them by SIGTERM, whose handler they must not inherit."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's warning to all processes, which only the parent heeds
