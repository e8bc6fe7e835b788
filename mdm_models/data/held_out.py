"""The samples that a model is evaluated on, shared out over the ranks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mdm_models.data.reader import SampleReader, Skip
from mdm_models.data.workers import loaded
from mdm_models.processes import Processes


@dataclass(frozen=True)
class HeldOutBatch:
    """A batch of held-out samples. numbers: of the B samples among those evaluated; images (B, 3, size, size) or clips
    (B, 3, frames, size, size) uint8; B captions; B prompts for the text encoder, others where it knows samples by name
    or class; rows: those that count. The rest, black and without caption, stand for samples that cannot be used, or
    that are not there."""

    numbers: list[int]
    images: Tensor
    captions: list[str]
    prompts: list[str]
    rows: list[int]


class HeldOut(Dataset):
    """At most `count` of the held-out samples `indices`, the same in every run.

    They are taken shard by shard, in random order, so that few shards are read, which may lie far away. Each rank has
    the same number of batches, all of the same sizes, so that all take part in every forward pass.
    keep: hold the images in memory after they were read once, 3 · frames · size² bytes each, and read them no more.
    """

    def __init__(
        self, reader: SampleReader, indices: np.ndarray, count: int, batch_size: int, processes: Processes, keep: bool
    ):
        self.reader = reader
        rng = np.random.default_rng(0)
        first = reader.samples.first  # number of each shard's first sample
        shard = rng.permutation(len(first))[np.searchsorted(first, indices, side="right") - 1]
        self.indices = indices[np.lexsort((rng.random(len(indices)), shard))[:count]]
        share = math.ceil(len(self.indices) / processes.world_size)
        self.batch_size = min(batch_size, share)
        self.numbers = range(processes.rank * share, (processes.rank + 1) * share)
        self.keep = keep
        self._kept: list[HeldOutBatch] = []

    def __getitem__(self, number: int) -> tuple[int, tuple[Tensor, str, str] | None]:
        """The number itself, with image, caption and prompt of the sample; None if it cannot be used."""
        found = None if number >= len(self.indices) else self.reader.try_show(int(self.indices[number]))
        return number, None if isinstance(found, Skip) else found

    def batches(self, workers: int) -> Iterator[HeldOutBatch]:
        """Yield this rank's share, decoded by so many processes; 0: by this one."""
        if self._kept:
            yield from self._kept
            return
        starts = range(0, len(self.numbers), self.batch_size)
        batches = [list(self.numbers[start : start + self.batch_size]) for start in starts]
        read = []
        for batch in loaded(self, batches, (self.batch_size, *self._shape), workers, self._collate):
            if self.keep:
                read.append(batch)
            yield batch
        self._kept = read

    def a_skip(self) -> Skip | None:
        """The first sample that cannot be used, read again for that, and why; None if all can."""
        found = (self.reader.try_show(int(index)) for index in self.indices)
        return next((skip for skip in found if isinstance(skip, Skip)), None)

    @property
    def _shape(self) -> Sequence[int]:
        channels, frames, *size = self.reader.config.shape
        return (channels, frames, *size) if frames > 1 else (channels, *size)

    def _collate(
        self, items: list[tuple[int, tuple[Tensor, str, str] | None]]
    ) -> tuple[list[Tensor], Callable[[Tensor], HeldOutBatch]]:
        nothing = torch.zeros(self._shape, dtype=torch.uint8), "", ""
        images, captions, prompts = zip(*(found or nothing for _, found in items), strict=True)
        numbers, rows = [number for number, _ in items], [row for row, (_, found) in enumerate(items) if found]
        of = partial(HeldOutBatch, numbers, captions=list(captions), prompts=list(prompts), rows=rows)
        return [image.view(self._shape) for image in images], of
