"""Clips and single pictures in one batch."""

import itertools

import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.data.mixed import kinds_of, mixed_batches
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import Batch, SampleStream, batches, split


@pytest.fixture
def streams(shard_of, pictures_of) -> list[SampleStream]:
    """Three clips of four frames, and five pictures."""
    config = DataConfig(
        (str(shard_of("c.tar", 3)),), (str(pictures_of("p.tar", 5)),), 0.25, size=16, frames=4, holdout=0
    )
    return [stream_of(kind) for kind in kinds_of(config)]


def stream_of(config: DataConfig) -> SampleStream:
    samples = ShardedSamples(open_shards(config))
    return SampleStream(SampleReader(samples, config), split(samples, 0)[0], seed=0, caption_dropout=0.0)


def take(streams: list[SampleStream], count: int, first_chunk: int = 0, **options) -> list[Batch]:
    """Chunks of three clips and a picture."""
    how = {"first_chunk": first_chunk, "rank": 0, "world_size": 1, "workers": 0} | options
    return list(itertools.islice(mixed_batches(list(zip(streams, (3, 1), strict=True)), **how), count))


def captions(taken: list[Batch]) -> list[list[str]]:
    return [batch.captions for batch in taken]


def test_pictures_stand_still_behind_the_clips(streams):
    [chunk] = take(streams, 1)
    assert chunk.images.shape == (4, 3, 4, 16, 16)
    assert [caption[0] for caption in chunk.captions] == ["c", "c", "c", "p"]
    still = chunk.images == chunk.images[:, :, :1]
    assert still.flatten(1).all(1).tolist() == [False, False, False, True]


def test_each_kind_is_what_it_would_be_alone(streams):
    mixed = take(streams, 4)
    for stream, count, place in zip(streams, (3, 1), (slice(3), slice(3, 4)), strict=True):
        alone = batches(stream, count, first_chunk=0, rank=0, world_size=1, workers=0)
        for chunk, own in zip(mixed, alone, strict=False):
            assert chunk.captions[place] == own.captions
            assert torch.equal(chunk.images[place], own.images.expand(-1, -1, 4, -1, -1))


def test_a_resumed_stream_goes_on_where_it_stopped(streams):
    assert captions(take(streams, 6)[2:]) == captions(take(streams, 4, first_chunk=2))


def test_ranks_take_the_chunks_of_one_process_in_turn(streams):
    shared = [take(streams, 3, rank=rank, world_size=2) for rank in range(2)]
    assert captions(take(streams, 6)) == captions([chunk for pair in zip(*shared, strict=True) for chunk in pair])


def test_skips_of_both_kinds_are_told(shard_of, pictures_of):
    bad = {"txt": b"a", "png": b"no picture"}
    config = DataConfig(
        (str(shard_of("c.tar", 3, z={"txt": b"a", "mp4": b"no clip"})),),
        (str(pictures_of("p.tar", 3, y=bad)),),
        0.25,
        size=16,
        frames=4,
        holdout=0,
        max_bad_share=1.0,
    )
    chunks = take([stream_of(kind) for kind in kinds_of(config)], 8)
    assert {skip.key for chunk in chunks for skip in chunk.skipped} == {"z", "y"}
