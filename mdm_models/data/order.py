"""Which sample stands at each position of the endless stream: functions of (seed, position), with nothing to store.

`Shuffled` permutes all samples anew for every epoch: the stream is the same on any number of processes, but a reader
needs every shard at hand. `Lanes` deals the shards to the processes that decode, so that each reads a few shards at a
time: right for shards that must be copied from somewhere else first.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

WINDOW = 4  # pieces of shards that a lane shuffles together
TRIES = 50  # samples tried in a window before the next one is


class Shuffled:
    """All samples in an order of their own in each epoch.  samples (N,): their numbers."""

    def __init__(self, samples: np.ndarray, seed: int):
        self.samples = samples
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None  # the last one asked for, and its order

    def __getitem__(self, position: int) -> int:
        """Number of the sample at a position."""
        epoch, offset = divmod(position, len(self.samples))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(self.samples)
        return int(self._epoch[1][offset])

    def others(self, position: int, rng: np.random.Generator) -> Iterator[int]:
        """Samples to take instead of the one at a position, without end."""
        while True:
            yield int(rng.choice(self.samples))


def pieces_of(shards: list[np.ndarray], lanes: int) -> list[np.ndarray]:
    """What is dealt to so many lanes: the shards, or, if there are fewer shards than lanes, equal parts of them.

    shards: the numbers of the samples in each.
    """
    shards = [samples for samples in shards if len(samples)]
    parts = -(-lanes // len(shards))
    return [piece for samples in shards for piece in np.array_split(samples, parts) if len(piece)]


@dataclass(frozen=True)
class Window:
    """A stretch of a lane in which samples are shuffled."""

    epoch: int
    number: int  # in its epoch
    pieces: np.ndarray  # (n,) numbers of the pieces it is made of
    first: int  # place in the lane of its first sample
    end: int  # place after its last one


class Lane:
    """One of several endless streams of samples that together show every sample once in each of their epochs.

    In each epoch all pieces are permuted, by the seed and the epoch alone, and dealt to the lanes in turn. A lane takes
    its pieces WINDOW at a time and shuffles their samples together. When it is through, it goes on with its share of
    the next epoch, whatever the others do: with pieces of unequal size lanes drift apart, but as each epoch deals anew,
    no sample is seen more often than others in the long run. Should there be fewer pieces than lanes (fewer samples,
    that is), lanes share pieces.

    Places are best asked for in rising order: going back begins at the first epoch.
    """

    def __init__(self, pieces: list[np.ndarray], seed: int, number: int, lanes: int):
        self.pieces = pieces
        self.seed = seed
        self.number = number
        self.lanes = lanes
        self._sizes = np.array([len(piece) for piece in pieces])
        self._shuffled: tuple[Window, np.ndarray] | None = None
        self._begin()

    def __getitem__(self, place: int) -> int:
        """Number of the sample at a place of the lane, 0 being its first."""
        if place < self._window.first:
            self._begin()
        while place >= self._window.end:
            self._window, self._next = self._next, next(self._windows)
        return int(self.samples(self._window)[place - self._window.first])

    @property
    def current(self) -> Window:
        """The window of the last place that was asked for."""
        return self._window

    @property
    def following(self) -> Window:
        """The window after the current one."""
        return self._next

    def samples(self, window: Window) -> np.ndarray:
        """Give the numbers (n,) of the samples of a window, in the lane's order."""
        if self._shuffled is None or self._shuffled[0] is not window:
            rng = np.random.default_rng((self.seed, 3, window.epoch, self.number, window.number))
            samples = rng.permutation(np.concatenate([self.pieces[piece] for piece in window.pieces]))
            self._shuffled = window, samples
        return self._shuffled[1]

    def _begin(self) -> None:
        self._windows = self._all_windows()
        self._window, self._next = next(self._windows), next(self._windows)

    def _all_windows(self) -> Iterator[Window]:
        first = 0
        for epoch in itertools.count():
            dealt = np.random.default_rng((self.seed, 2, epoch)).permutation(len(self.pieces))
            mine = np.resize(dealt, max(len(dealt), self.lanes))[self.number :: self.lanes]
            for number, pieces in enumerate(np.array_split(mine, -(-len(mine) // WINDOW))):
                end = first + int(self._sizes[pieces].sum())
                yield Window(epoch, number, pieces, first, end)
                first = end


class Lanes:
    """All lanes as one stream: chunk g of it, `chunk_size` samples long, is the next chunk of lane g % lanes."""

    def __init__(self, pieces: list[np.ndarray], seed: int, lanes: int, chunk_size: int):
        self.pieces = pieces
        self.seed = seed
        self.lanes = lanes
        self.chunk_size = chunk_size
        self._begun: dict[int, Lane] = {}

    def lane_at(self, position: int) -> Lane:
        """Give the lane that a position falls to."""
        number = position // self.chunk_size % self.lanes
        if number not in self._begun:
            self._begun[number] = Lane(self.pieces, self.seed, number, self.lanes)
        return self._begun[number]

    def __getitem__(self, position: int) -> int:
        """Number of the sample at a position."""
        chunk, offset = divmod(position, self.chunk_size)
        return self.lane_at(position)[chunk // self.lanes * self.chunk_size + offset]

    def others(self, position: int, rng: np.random.Generator) -> Iterator[int]:
        """Samples to take instead of the one at a position, without end: from its window while there is hope, then from
        the next one, then from anywhere."""
        self[position]
        lane = self.lane_at(position)
        for window in (lane.current, lane.following):
            pieces = np.concatenate([self.pieces[piece] for piece in window.pieces])
            for _ in range(TRIES):
                yield int(rng.choice(pieces))
        while True:
            yield int(rng.choice(self.pieces[rng.integers(len(self.pieces))]))
