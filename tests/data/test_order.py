import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mdm_models.data.order import WINDOW, Lane, Lanes, Shuffled, pieces_of


def shards_of(sizes: list[int]) -> list[np.ndarray]:
    """Consecutive numbers in shards of these sizes."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def first_epoch(lane: Lane) -> list[int]:
    """The samples of a lane's first epoch, in order."""
    samples = []
    for place in itertools.count():
        sample = lane[place]
        if lane.current.epoch:
            return samples
        samples.append(sample)
    raise AssertionError


sizes_of_shards = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(count=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_shuffling_shows_each_sample_once_an_epoch(count, seed, epoch):
    order = Shuffled(np.arange(count) * 3, seed)
    assert sorted(order[p] for p in range(epoch * count, epoch * count + count)) == [3 * i for i in range(count)]


def test_epochs_and_seeds_have_orders_of_their_own():
    order, other = Shuffled(np.arange(40), 0), Shuffled(np.arange(40), 1)
    first, second = [order[p] for p in range(40)], [order[p] for p in range(40, 80)]
    assert first != second
    assert first != [other[p] for p in range(40)]


@given(sizes=sizes_of_shards, lanes=st.integers(1, 8))
def test_pieces_are_all_samples_in_at_least_one_piece_a_lane(sizes, lanes):
    pieces = pieces_of(shards_of(sizes), lanes)
    assert sorted(np.concatenate(pieces)) == list(range(sum(sizes)))
    assert len(pieces) >= min(lanes, sum(bool(size) for size in sizes))
    assert all(len(piece) for piece in pieces)


def test_shards_are_not_cut_while_there_is_one_for_each_lane():
    assert len(pieces_of(shards_of([9] * 4), lanes=4)) == 4
    assert [len(piece) for piece in pieces_of(shards_of([9] * 3), lanes=4)] == [5, 4] * 3


@settings(deadline=None)
@given(sizes=sizes_of_shards, lanes=st.integers(1, 6), seed=st.integers(0, 5))
def test_the_lanes_together_show_each_sample_once_an_epoch(sizes, lanes, seed):
    pieces = pieces_of(shards_of(sizes), lanes)
    shown = [first_epoch(Lane(pieces, seed, number, lanes)) for number in range(lanes)]
    if len(pieces) >= lanes:
        assert sorted(itertools.chain(*shown)) == list(range(sum(sizes)))
    else:
        assert set(itertools.chain(*shown)) == set(range(sum(sizes)))


def test_each_shard_is_in_one_lane_in_an_epoch():
    pieces = pieces_of(shards_of([10] * 7), lanes=3)
    shards = [{sample // 10 for sample in first_epoch(Lane(pieces, 0, number, 3))} for number in range(3)]
    assert [len(each) for each in shards] == [3, 2, 2]
    assert set.union(*shards) == set(range(7))


def test_a_lane_has_few_shards_open_and_mixes_them():
    pieces = pieces_of(shards_of([10] * 12), lanes=1)
    samples = first_epoch(Lane(pieces, 0, 0, 1))
    windows = [{sample // 10 for sample in samples[i : i + 10 * WINDOW]} for i in range(0, 120, 10 * WINDOW)]
    assert [len(window) for window in windows] == [WINDOW] * 3
    assert set.union(*windows) == set(range(12))
    assert len({sample // 10 for sample in samples[:10]}) > 1


def test_each_epoch_deals_anew():
    lane = Lane(pieces_of(shards_of([10] * 8), lanes=2), 0, 0, 2)
    epochs = [{lane[place] // 10 for place in range(e * 40, e * 40 + 40)} for e in range(4)]
    assert all(len(shards) == 4 for shards in epochs)
    assert len({tuple(sorted(shards)) for shards in epochs}) > 1


@settings(deadline=None)
@given(sizes=sizes_of_shards, lanes=st.integers(1, 4), chunk=st.integers(1, 5), start=st.integers(0, 200))
def test_lanes_go_on_from_any_position_as_if_never_stopped(sizes, lanes, chunk, start):
    pieces = pieces_of(shards_of(sizes), lanes)
    whole, resumed = Lanes(pieces, 0, lanes, chunk), Lanes(pieces, 0, lanes, chunk)
    stream = [whole[position] for position in range(start + 30)]
    assert [resumed[position] for position in range(start, start + 30)] == stream[start:]


def test_a_lane_can_go_back():
    lane = Lane(pieces_of(shards_of([5] * 9), lanes=1), 0, 0, 1)
    forth = [lane[place] for place in range(100)]
    assert [lane[place] for place in reversed(range(100))] == forth[::-1]


def test_a_rank_and_worker_stay_in_one_lane():
    """Two ranks of three workers, chunks of 5: chunk g is of lane g % 6."""
    pieces = pieces_of(shards_of([30] * 6), lanes=6)
    order = Lanes(pieces, 0, 6, 5)
    for number in range(6):
        chunks = range(number, 36, 6)
        samples = [order[p] for chunk in chunks for p in range(chunk * 5, chunk * 5 + 5)]
        assert samples == first_epoch(Lane(pieces, 0, number, 6))
        assert len({sample // 30 for sample in samples}) == 1


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_replacement_comes_from_open_shards_first(lanes):
    order = Lanes(pieces_of(shards_of([10] * 30), lanes), 0, lanes, 10)
    lane = order.lane_at(0)
    order[0]
    near = {int(piece) for piece in lane.current.pieces} | {int(piece) for piece in lane.following.pieces}
    tried = list(itertools.islice(order.others(0, np.random.default_rng(0)), 200))
    assert {sample // 10 for sample in tried[:50]} <= {int(piece) for piece in lane.current.pieces}
    assert {sample // 10 for sample in tried[:100]} <= near
    assert len({sample // 10 for sample in tried}) > len(near)
