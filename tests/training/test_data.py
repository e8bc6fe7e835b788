import itertools
import json

import numpy as np
import pytest
import torch

from mdm_models.training.data import ClipReader, ClipStream, Skip, batches, caption_of, split, to_unit_range
from mdm_models.training.errors import DataError
from mdm_models.training.media import BadSample
from mdm_models.training.shards import ShardedSamples, scan_all

NOISE = b"not a clip"


@pytest.fixture
def reader_of():
    def make(*paths, frames: int = 4, size: int = 16) -> ClipReader:
        return ClipReader(ShardedSamples(scan_all([str(path) for path in paths])), frames, 8.0, size)

    return make


def take(reader: ClipReader, steps: int, batch_size: int = 2, **options) -> list:
    options = {"samples_seen": 0, "rank": 0, "world": 1, "workers": 0, "seed": 3, "caption_dropout": 0.0} | options
    stream = ClipStream(reader, np.arange(len(reader.samples)), options.pop("seed"), options.pop("caption_dropout"))
    return list(itertools.islice(batches(stream, batch_size, **options), steps))


def captions(taken: list) -> list[str]:
    return [caption for batch in taken for caption in batch.captions]


def test_a_batch_holds_clips_and_captions(reader_of, shard_of):
    [batch] = take(reader_of(shard_of("a.tar", 3)), 1)
    assert batch.images.shape == (2, 3, 4, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert len(batch.captions) == 2


def test_bytes_become_plus_minus_one():
    values = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0]


def test_every_epoch_shows_every_sample_once_in_another_order(reader_of, shard_of):
    seen = captions(take(reader_of(shard_of("a.tar", 8)), 8))
    assert sorted(seen[:8]) == sorted(seen[8:]) == [f"a{i}" for i in range(8)]
    assert seen[:8] != seen[8:]


def test_a_resumed_stream_goes_on_where_it_stopped(reader_of, shard_of):
    reader = reader_of(shard_of("a.tar", 5))
    whole, rest = take(reader, 6), take(reader, 3, samples_seen=6)
    assert captions(rest) == captions(whole)[6:]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[3:], strict=True))


def test_worker_processes_change_nothing(reader_of, shard_of):
    reader = reader_of(shard_of("a.tar", 5))
    alone, helped = take(reader, 4), take(reader, 4, workers=2)
    assert captions(alone) == captions(helped)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))


def test_ranks_share_one_shard_without_overlap(reader_of, shard_of):
    reader = reader_of(shard_of("a.tar", 8))
    seen = [caption for rank in range(4) for caption in captions(take(reader, 1, rank=rank, world=4))]
    assert sorted(seen) == [f"a{i}" for i in range(8)]


def test_captions_are_dropped_at_the_stated_rate(reader_of, shard_of):
    dropped = captions(take(reader_of(shard_of("a.tar", 2)), 100, caption_dropout=0.25)).count("")
    assert 30 < dropped < 70  # 50 ± 3 standard deviations


def test_a_bad_sample_is_replaced_counted_and_named(reader_of, shard_of):
    shard = shard_of("a.tar", 3, bad={"mp4": NOISE, "txt": b"a bad one"}, mute={"mp4": NOISE})
    taken = take(reader_of(shard), 10)
    assert set(captions(taken)) == {"a0", "a1", "a2"}
    skips = {(skip.key, skip.reason) for batch in taken for skip in batch.skipped}
    assert skips == {("bad", "undecodable"), ("mute", "caption missing")}
    assert {skip.shard for batch in taken for skip in batch.skipped} == {str(shard)}


def test_skips_reach_the_trainer_from_worker_processes(reader_of, shard_of):
    taken = take(reader_of(shard_of("a.tar", 1, bad={"mp4": NOISE, "txt": b"bad"})), 4, workers=2)
    assert {skip.key for batch in taken for skip in batch.skipped} == {"bad"}


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_samples_end_in_an_error(reader_of, shard_of, workers):
    reader = reader_of(shard_of("a.tar", 0, x={"mp4": NOISE, "txt": b"x"}, y={"png": NOISE, "txt": b"y"}))
    with pytest.raises(DataError, match=r"cannot be used.*a\.tar.*too short.*undecodable"):
        take(reader, 1, workers=workers)


def test_a_shard_that_goes_away_is_a_counted_skip(reader_of, shard_of):
    gone = shard_of("b.tar", 2)
    reader = reader_of(shard_of("a.tar", 2), gone)
    gone.unlink()
    taken = take(reader, 6)
    assert set(captions(taken)) == {"a0", "a1"}
    assert {(skip.shard, skip.reason) for batch in taken for skip in batch.skipped} == {(str(gone), "shard unreadable")}


def test_images_train_an_image_model(reader_of):
    from tests.training.test_shards import SAMPLE

    reader = reader_of(SAMPLE / "images-000.tar", frames=1, size=64)
    [batch] = take(reader, 1, batch_size=3)
    assert batch.images.shape == (3, 3, 1, 64, 64)
    assert batch.skipped == []


def test_an_image_is_too_short_for_a_clip_model(reader_of):
    from tests.training.test_shards import SAMPLE

    found = reader_of(SAMPLE / "images-000.tar").try_read(0)
    assert isinstance(found, Skip)
    assert found.reason == "too short"


def test_damaged_shards_are_reported(reader_of, shard_of):
    path = shard_of("a.tar", 3)
    path.write_bytes(path.read_bytes()[:-11000])
    [damage] = reader_of(path).damaged()
    assert (damage.shard, damage.reason) == (str(path), "shard damaged")


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b" a cat\n"}, "a cat"),
        ({"json": json.dumps({"caption": "a dog"}).encode()}, "a dog"),
        ({"json": json.dumps({"text": "a cow"}).encode()}, "a cow"),
        ({"txt": "été".encode(), "json": b"{"}, "été"),
    ],
)
def test_captions_come_from_text_or_json(files, caption):
    assert caption_of(files) == caption


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "caption missing"),
        ({"txt": b" \n"}, "caption empty"),
        ({"json": b"{}"}, "caption empty"),
        ({"txt": b"\xff\xfe\x00"}, "caption unreadable"),
        ({"json": b"{"}, "caption unreadable"),
        ({"json": b"[1]"}, "caption unreadable"),
        ({"json": b'{"caption": 5}'}, "caption unreadable"),
    ],
)
def test_a_bad_caption_says_why(files, reason):
    with pytest.raises(BadSample) as bad:
        caption_of(files)
    assert bad.value.reason == reason


def test_one_in_so_many_is_held_out():
    training, validation = split(2000, holdout=1000)
    assert len(validation) == 2
    assert sorted([*training, *validation]) == list(range(2000))


def test_nothing_is_held_out_of_a_small_set():
    training, validation = split(32, holdout=1000)
    assert (len(training), len(validation)) == (32, 0)
