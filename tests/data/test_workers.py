"""Processes that decode, where the machine gives them too little."""

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mdm_models.data.workers import loaded
from mdm_models.errors import DataError

PICTURE = (3, 64, 64)


@dataclass
class Made:
    images: Tensor
    numbers: list[int]


def collate(items: list[tuple[int, Tensor]]) -> tuple[list[Tensor], Callable[[Tensor], Made]]:
    return [image for _, image in items], partial(Made, numbers=[number for number, _ in items])


class Numbers(Dataset):
    """Item n is a picture full of n."""

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, torch.full(PICTURE, number, dtype=torch.uint8)


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    """This process and those that it starts get so little of a resource."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def read(batches: Iterable[list[int]], workers: int) -> Iterator[Made]:
    return loaded(Numbers(), batches, (2, *PICTURE), workers, collate)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_their_order_and_stay_as_they_are_while_others_come(workers):
    batches = [[2 * n, 2 * n + 1] for n in range(100)] + [[200]]  # many more than there are rows of shared memory
    made = list(read(batches, workers))
    assert [batch.numbers for batch in made] == batches
    for batch in made:
        wanted = torch.tensor(batch.numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, *PICTURE)
        assert torch.equal(batch.images, wanted)


def test_a_batch_in_which_nothing_is_usable_has_no_images():
    [made] = loaded(Numbers(), [[1, 2]], (2, *PICTURE), 1, lambda _: ([], partial(Made, numbers=[])))
    assert made.images.shape == (0, *PICTURE)


def test_want_of_shared_memory_is_told_before_anything_is_read():
    said = r"^data: 1 --workers cannot be started: no 0.0737 MB of shared memory: .*File too large.*/dev/shm"
    with limited(resource.RLIMIT_FSIZE, 10_000), pytest.raises(DataError, match=said) as ended:
        next(read([[0, 1]], 1))
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("limit", "value", "why"),
    [(resource.RLIMIT_FSIZE, 0, "File too large"), (resource.RLIMIT_NOFILE, 40, "Too many open files")],
    ids=["no semaphores", "no pipes"],
)
def test_processes_that_cannot_be_started_are_said_to_be_so(limit, value, why, capfd):
    with limited(limit, value), pytest.raises(DataError, match=rf"data: 32 --workers cannot be started: {why}"):
        next(read([[0, 1]], 32))
    assert "Traceback" not in capfd.readouterr().err
