"""Processes that decode, where the machine gives them too little."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mdm_models.data.workers import loaded
from mdm_models.errors import DataError


@dataclass
class Made:
    images: Tensor


def made(items: list[Tensor]) -> Made:
    return Made(torch.stack(items))


class Numbers(Dataset):
    """Item n is a picture full of n; when item 2 is read, its process has nothing left of a resource."""

    def __init__(self, limit: int | None = None):
        self.limit = limit

    def __getitem__(self, number: int) -> Tensor:
        if self.limit is not None and number == 2:
            resource.setrlimit(self.limit, (0, resource.getrlimit(self.limit)[1]))
        return torch.full((3, 64, 64), number, dtype=torch.uint8)


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    """This process and those that it starts get so little of a resource."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def read(dataset: Numbers, workers: int = 1) -> list[int]:
    """The numbers of four batches of two."""
    batches = [[0, 1], [2, 3], [4, 5], [6, 7]]
    return [int(n) for batch in loaded(dataset, batches, workers, made) for n in batch.images[:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_their_order(workers):
    assert read(Numbers(), workers) == list(range(8))


def test_a_batch_that_finds_no_room_in_shared_memory_ends_the_wait_for_it():
    said = r"^data: a batch of 0.0246 MB cannot be shared .*File too large.*/dev/shm"
    with pytest.raises(DataError, match=said) as ended:
        read(Numbers(resource.RLIMIT_FSIZE))
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("limit", "value", "why"),
    [(resource.RLIMIT_FSIZE, 0, "File too large"), (resource.RLIMIT_NOFILE, 40, "Too many open files")],
    ids=["no semaphores", "no pipes"],
)
def test_processes_that_cannot_be_started_are_said_to_be_so(limit, value, why, capfd):
    with limited(limit, value), pytest.raises(DataError, match=rf"data: 32 --workers cannot be started: {why}"):
        read(Numbers(), workers=32)
    assert "Traceback" not in capfd.readouterr().err
