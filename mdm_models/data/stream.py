"""Captioned clips or images from WebDataset shards, as an endless stream of batches.

Which sample stands at position p of the stream (see `order.py`), how it is cut, where its clip starts and whether its
caption is dropped are functions of (seed, p), so that a resumed run sees what an uninterrupted one would have, and
ranks never run out at different times. A sample that cannot be used is skipped, another one takes its place, and the
skip travels with the batch to whoever counts.

A *chunk* is the samples that go through one process at once: chunk g holds the positions g · size … (g + 1) · size − 1.
"""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from mdm_models.data.locations import UnreachableError
from mdm_models.data.media import Cut
from mdm_models.data.order import Lanes, Shuffled, Window, pieces_of
from mdm_models.data.reader import PASSING, SampleReader, Skip
from mdm_models.data.shards import ShardedSamples
from mdm_models.data.workers import loaded
from mdm_models.errors import DataError

ATTEMPTS = 200  # unusable samples in a row before the data set is given up


@dataclass
class Batch:
    """A chunk of samples: images (B, 3, frames, size, size) uint8; B captions, "" where dropped; the samples skipped on
    the way, each once.

    bad: how often a sample was tried that cannot be used; shards: numbers of the shards that were read or lost.
    """

    images: Tensor
    captions: list[str]
    skipped: list[Skip]
    bad: int = 0
    shards: frozenset[int] = frozenset()


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8 0…255 to float32 −1…1 of the same shape."""
    return images.float().div_(127.5).sub_(1)


def split(samples: ShardedSamples, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the numbers of the training and of the validation samples, each in rising order, which is shard by shard.

    A sample is held out if the hash of its key lies in the lowest `holdout` of all hashes, whatever the seed and the
    other samples. Raises DataError if nothing is left to train on.
    """
    held = samples.keys < np.uint64(holdout * 2**64)
    if held.all():
        raise DataError(f"holdout is {holdout}; it leaves none of the {len(samples)} samples to train on")
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclass(frozen=True)
class SampleStream:
    """Samples without end for training.

    training (N,): numbers of the samples; caption_dropout: share of the samples whose caption is left out.
    """

    reader: SampleReader
    training: np.ndarray
    seed: int
    caption_dropout: float

    @property
    def dealt(self) -> bool:
        """Whether shards are dealt to the processes that decode, which then read no others."""
        choice = self.reader.config.split_shards
        return choice == "yes" or (choice == "auto" and any(shard.cache for shard in self.reader.samples.shards))

    def order(self, chunk_size: int, lanes: int) -> Shuffled | Lanes:
        """Make the order that says which sample stands at each position. lanes: how many processes decode."""
        if not self.dealt:
            return Shuffled(self.training, self.seed)
        shards = np.split(self.training, np.searchsorted(self.training, self.reader.samples.first[1:-1]))
        return Lanes(pieces_of(shards, lanes), self.seed, lanes, chunk_size)


@dataclass(frozen=True)
class Item:
    """What was found for a position: a clip, or None if nothing usable was."""

    clip: Tensor | None
    caption: str
    skipped: list[Skip]
    shards: set[int]  # where it was looked for


class Positions(Dataset):
    """Gives the Item of each position in the stream."""

    def __init__(self, stream: SampleStream, order: Shuffled | Lanes):
        self.stream = stream
        self.order = order
        self._bad: dict[int, Skip] = {}  # known to be unusable: not decoded again
        self._fetching: Window | None = None

    def __getitem__(self, position: int) -> Item:
        stream, config = self.stream, self.stream.reader.config
        rng = np.random.default_rng((stream.seed, 1, position))
        start, drop, place, mirror = rng.random(4)
        cut = Cut(place if config.crop == "random" else 0.5, config.flip and mirror < 0.5)
        start = {"random": start, "first": 0.0, "middle": 0.5}[config.clip_start]
        skipped: list[Skip] = []
        shards: set[int] = set()
        index = self.order[position]
        self._read_ahead(position)
        others = self.order.others(position, rng)
        for _ in range(ATTEMPTS):
            shards.add(stream.reader.samples.number_of(index))
            found = self._bad.get(index) or stream.reader.try_read(index, start, cut)
            if not isinstance(found, Skip):
                clip, caption = found
                return Item(clip, "" if drop < stream.caption_dropout else caption, skipped, shards)
            if found.reason not in PASSING:
                self._bad[index] = found
            skipped.append(found)
            index = next(others)
        return Item(None, "", skipped, shards)

    def _read_ahead(self, position: int) -> None:
        """When a lane enters a window, begin to copy its shards, and then those of the next one."""
        if not isinstance(self.order, Lanes):
            return
        lane = self.order.lane_at(position)
        if lane.current is self._fetching:
            return
        self._fetching = lane.current
        samples = self.stream.reader.samples
        pieces = [self.order.pieces[piece] for piece in (*lane.current.pieces, *lane.following.pieces)]
        shards = dict.fromkeys(samples.number_of(piece[0]) for piece in pieces)
        threading.Thread(target=_fetch, args=(samples, list(shards)), daemon=True).start()


def _fetch(samples: ShardedSamples, shards: list[int]) -> None:
    for number in shards:
        try:
            samples.fetch(number)
        except (UnreachableError, OSError):  # whoever reads it will find out, and say so
            return


def batches(
    stream: SampleStream,
    chunk_size: int,
    *,
    first_chunk: int,
    rank: int,
    world_size: int,
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield chunks without end for one rank: those of the chunks rank, rank + world_size, … from `first_chunk` on.

    If shards are dealt, there are world_size · max(workers, 1) lanes, and chunk g is of lane g % lanes: as a rank's
    chunks go to its workers in turn, each worker reads one lane. With another number of ranks or workers shards are
    dealt differently, and a run that goes on so may see some samples of its epoch again before others.

    Raises DataError when ATTEMPTS samples in a row could not be used, or more than `max_bad_share` of those tried or of
    their shards. It is raised on the rank that finds it.
    """
    first = first_chunk + (rank - first_chunk) % world_size
    chunks = (range(g * chunk_size, (g + 1) * chunk_size) for g in itertools.count(first, world_size))
    positions = Positions(stream, stream.order(chunk_size, world_size * max(workers, 1)))
    config = stream.reader.config
    tally = Tally(config.max_bad_share)
    for batch in loaded(positions, map(list, chunks), (chunk_size, *config.shape), workers, _collate, pin):
        tally.add(batch, whole=len(batch.captions) == chunk_size)
        yield batch


class Tally:
    """Counts how many of the samples tried could not be used, and of the shards.

    A shard that is lost counts as one: all its samples fail together, and would pass for many in the process that has
    it to read.
    """

    def __init__(self, max_bad_share: float):
        self.max_bad_share = max_bad_share
        self.tried = self.bad = 0
        self.shards: set[int] = set()
        self.lost: set[str] = set()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, Skip] = {}

    def add(self, batch: Batch, whole: bool) -> None:
        """Count a batch. whole: whether a usable sample was found for each place. Raises DataError if too many cannot
        be used."""
        self.tried += len(batch.captions) + batch.bad
        self.bad += batch.bad
        self.shards |= batch.shards
        for skip in batch.skipped:
            self.reasons[skip.reason] += 1
            self.examples[skip.reason] = skip
            if skip.reason in PASSING:
                self.lost.add(skip.shard)
        if not whole:
            raise DataError(f"data: {ATTEMPTS} samples in a row cannot be used: {self._why()}")
        for bad, tried, what in ((self.bad, self.tried, "samples"), (len(self.lost), len(self.shards), "shards")):
            if self._too_many(bad, tried):
                raise DataError(
                    f"data: {bad} of {tried} {what} tried cannot be used, more than max_bad_share "
                    f"{self.max_bad_share}: {self._why()}"
                )

    def _too_many(self, bad: int, tried: int) -> bool:
        """Whether the share is passed by more than three standard deviations, lest a few bad ones at the start of a run
        end it by chance."""
        share = self.max_bad_share
        return bad > share * tried + 3 * math.sqrt(share * (1 - share) * tried)

    def _why(self) -> str:
        """The most frequent reasons, each with an example."""
        return "; ".join(str(self.examples[reason]) for reason, _ in self.reasons.most_common(3))


def _collate(items: list[Item]) -> tuple[list[Tensor], Callable[[Tensor], Batch]]:
    """The images, and what makes a batch of them; fewer than asked if nothing usable was found for an item."""
    usable = [(item.clip, item.caption) for item in items if item.clip is not None]
    skipped = [skip for item in items for skip in item.skipped]
    bad = sum(skip.reason not in PASSING for skip in skipped)
    shards = frozenset().union(*(item.shards for item in items))
    captions = [caption for _, caption in usable]
    of = partial(Batch, captions=captions, skipped=list(dict.fromkeys(skipped)), bad=bad, shards=shards)
    return [clip for clip, _ in usable], of
