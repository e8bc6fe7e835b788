import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models.data import locations
from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader, Skip
from mdm_models.data.shard_index import hash_of, scan
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import Batch, SampleStream, Tally, batches, split, to_unit_range
from mdm_models.errors import DataError
from tests.made_data import PICTURE, encode_image

SAMPLE = Path(__file__).parents[2] / "recipes" / "data"
NOISE = b"not a clip"


@pytest.fixture
def reader_of(tmp_path) -> Callable[..., SampleReader]:
    def make(*shards, **changes) -> SampleReader:
        settings = {"size": 16, "cache": str(tmp_path / "cache"), "max_bad_share": 1.0} | changes
        config = DataConfig(tuple(map(str, shards)), **settings)
        return SampleReader(ShardedSamples(open_shards(config)), config)

    return make


def take(reader: SampleReader, count: int, chunk_size: int = 2, **options) -> list[Batch]:
    """The first `count` chunks of rank 0."""
    options = {"first_chunk": 0, "rank": 0, "world_size": 1, "workers": 0, "seed": 3, "caption_dropout": 0.0} | options
    seed, dropout = options.pop("seed"), options.pop("caption_dropout")
    stream = SampleStream(reader, np.arange(len(reader.samples)), seed, dropout)
    return list(itertools.islice(batches(stream, chunk_size, **options), count))


def captions(taken: list[Batch]) -> list[str]:
    return [caption for batch in taken for caption in batch.captions]


def test_a_batch_holds_clips_and_captions(reader_of, shard_of):
    [batch] = take(reader_of(shard_of("a.tar", 3), frames=4), 1)
    assert batch.images.shape == (2, 3, 4, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert len(batch.captions) == 2


def test_real_images_train_an_image_model(reader_of):
    [batch] = take(reader_of(SAMPLE / "images-000.tar", size=64), 1, chunk_size=3)
    assert batch.images.shape == (3, 3, 1, 64, 64)
    assert batch.skipped == []


def test_bytes_become_plus_minus_one():
    values = to_unit_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("split_shards", ["no", "yes"])
def test_every_epoch_shows_every_sample_once_in_another_order(reader_of, pictures_of, split_shards):
    seen = captions(take(reader_of(pictures_of("a.tar", 8), split_shards=split_shards), 8))
    assert sorted(seen[:8]) == sorted(seen[8:]) == [f"a{i}" for i in range(8)]
    assert seen[:8] != seen[8:]


@pytest.mark.parametrize("split_shards", ["no", "yes"])
def test_a_resumed_stream_goes_on_where_it_stopped(reader_of, shard_of, split_shards):
    reader = reader_of(shard_of("a.tar", 5), shard_of("b.tar", 2), frames=4, split_shards=split_shards)
    whole, rest = take(reader, 6), take(reader, 3, first_chunk=3)
    assert captions(rest) == captions(whole)[6:]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[3:], strict=True))


def test_worker_processes_change_nothing(reader_of, shard_of):
    reader = reader_of(shard_of("a.tar", 5), frames=4, crop="random", flip=True)
    alone, helped = take(reader, 4), take(reader, 4, workers=2)
    assert captions(alone) == captions(helped)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("split_shards", ["no", "yes"])
def test_ranks_share_one_shard_without_overlap(reader_of, pictures_of, split_shards):
    reader = reader_of(pictures_of("a.tar", 8), split_shards=split_shards)
    seen = [caption for rank in range(4) for caption in captions(take(reader, 1, rank=rank, world_size=4))]
    assert sorted(seen) == [f"a{i}" for i in range(8)]


@pytest.mark.parametrize("first_chunk", [0, 3])
def test_ranks_take_the_chunks_of_one_process_in_turn(reader_of, pictures_of, first_chunk):
    reader = reader_of(pictures_of("a.tar", 9))
    alone = take(reader, 6, first_chunk=first_chunk)
    shared = [take(reader, 3, first_chunk=first_chunk, rank=rank, world_size=2) for rank in range(2)]
    order = shared if first_chunk % 2 == 0 else shared[::-1]
    assert captions(alone) == captions([batch for pair in zip(*order, strict=True) for batch in pair])


def _note_readers(monkeypatch, log: Path) -> None:
    """Have every sample that is read noted: process, and shard."""
    read = SampleReader.try_read

    def noted(self, index, *arguments):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {Path(self.samples.shard_of(index).path).name}\n")
        return read(self, index, *arguments)

    monkeypatch.setattr(SampleReader, "try_read", noted)


@pytest.mark.parametrize("first_chunk", [0, 3])
def test_each_worker_process_reads_shards_of_its_own(reader_of, pictures_of, monkeypatch, tmp_path, first_chunk):
    """Two ranks of two workers and four shards, in their first epoch: a lane has 16 chunks in it, and the loader asks
    for a few more than are taken."""
    reader = reader_of(*(pictures_of(f"{i}.tar", 32) for i in range(4)), split_shards="yes")
    _note_readers(monkeypatch, tmp_path / "log")
    for rank in range(2):
        take(reader, 4, first_chunk=first_chunk, rank=rank, world_size=2, workers=2)
    readings = {tuple(line.split()) for line in (tmp_path / "log").read_text().splitlines()}
    assert len({process for process, _ in readings}) == 4
    assert len({shard for _, shard in readings}) == 4
    assert len(readings) == 4


def test_one_shard_elsewhere_and_more_workers_than_shards(reader_of, pictures_of, bucket):
    reader = reader_of(bucket(pictures_of("a.tar", 24)))
    seen = captions(take(reader, 12, workers=2))
    assert sorted(seen) == sorted(f"a{i}" for i in range(24))


def test_shards_elsewhere_are_dealt_and_local_ones_are_not(reader_of, pictures_of, bucket):
    shard = pictures_of("a.tar", 4)
    dealt = [
        SampleStream(reader, np.arange(4), 0, 0.0).dealt
        for reader in (
            reader_of(shard),
            reader_of(bucket(shard)),
            reader_of(shard, split_shards="yes"),
            reader_of(bucket(shard), split_shards="no"),
        )
    ]
    assert dealt == [False, True, True, False]


def test_the_next_window_is_copied_while_one_is_read(reader_of, pictures_of, tmp_path):
    """Nine shards are three windows of three. Two samples are read, all of the first window."""
    shards = [f"pipe:cat {pictures_of(f'{i}.tar', 2)}" for i in range(9)]
    reader = reader_of(*shards)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    take(reader, 1)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.tar"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list((tmp_path / "cache").glob("*.tar"))) >= 4  # at least one that was read, three that were not


def test_captions_are_dropped_at_the_stated_rate(reader_of, pictures_of):
    dropped = captions(take(reader_of(pictures_of("a.tar", 2)), 100, caption_dropout=0.25)).count("")
    assert 30 < dropped < 70  # 50 ± 3 standard deviations


def test_half_of_the_samples_are_mirrored_if_that_is_allowed(reader_of, tmp_path, pictures_of):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, :8] = 255
    shard = pictures_of("a.tar", 0, a={"png": encode_image(half), "txt": b"a"})
    for flip in (False, True):
        images = torch.cat([batch.images for batch in take(reader_of(shard, flip=flip), 50)])
        mirrored = (images[..., 0].float().mean(dim=(1, 2, 3)) < 128).sum()
        assert 35 < mirrored < 65 if flip else mirrored == 0  # 50 ± 3 standard deviations


@pytest.mark.parametrize(("crop", "several"), [("centre", False), ("random", True)])
def test_crops_vary_if_they_are_random(reader_of, pictures_of, crop, several):
    wide = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)
    shard = pictures_of("a.tar", 0, a={"png": encode_image(wide), "txt": b"a"})
    images = torch.cat([batch.images for batch in take(reader_of(shard, crop=crop), 8)])
    assert (len(images.flatten(1).float().mean(dim=1).unique()) > 4) == several


@pytest.mark.parametrize(("clip_start", "starts"), [("first", 1), ("middle", 1), ("random", 4)])
def test_clips_begin_where_the_settings_say(reader_of, shard_of, clip_start, starts):
    reader = reader_of(shard_of("a.tar", 1), frames=4, clip_start=clip_start)
    first_frames = torch.cat([batch.images[:, :, 0] for batch in take(reader, 6)])
    levels = first_frames.float().mean(dim=(1, 2, 3)).round().unique()
    assert len(levels) >= starts
    assert len(levels) == 1 or clip_start == "random"
    assert (levels[0] < 5) == (clip_start != "middle") or clip_start == "random"


@pytest.mark.parametrize("split_shards", ["no", "yes"])
def test_a_bad_sample_is_replaced_counted_and_named(reader_of, pictures_of, split_shards):
    shard = pictures_of("a.tar", 3, bad={"mp4": NOISE, "txt": b"a bad one"}, mute={"png": PICTURE})
    taken = take(reader_of(shard, split_shards=split_shards), 10)
    assert set(captions(taken)) == {"a0", "a1", "a2"}
    skips = {(skip.key, skip.reason) for batch in taken for skip in batch.skipped}
    assert skips == {("bad", "undecodable"), ("mute", "caption missing")}
    assert {skip.shard for batch in taken for skip in batch.skipped} == {str(shard)}
    assert sum(batch.bad for batch in taken) > 0


def test_skips_reach_the_trainer_from_worker_processes(reader_of, pictures_of):
    taken = take(reader_of(pictures_of("a.tar", 1, bad={"mp4": NOISE, "txt": b"bad"})), 4, workers=2)
    assert {skip.key for batch in taken for skip in batch.skipped} == {"bad"}


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_samples_end_in_an_error(reader_of, shard_of, workers):
    shard = shard_of("a.tar", 0, x={"mp4": NOISE, "txt": b"x"}, y={"png": NOISE, "txt": b"y"})
    with pytest.raises(DataError, match=r"200 samples in a row cannot be used: .*\(. in .*a\.tar: "):
        take(reader_of(shard, frames=4), 1, workers=workers)


@pytest.mark.parametrize(("share", "ends"), [(0.05, True), (0.4, False)])
def test_more_than_the_set_share_of_bad_samples_ends_the_run(reader_of, pictures_of, share, ends):
    """One in five is bad."""
    shard = pictures_of("a.tar", 8, x={"png": NOISE, "txt": b"x"}, y={"png": PICTURE, "txt": b""})
    reader = reader_of(shard, max_bad_share=share)
    if ends:
        with pytest.raises(DataError, match=r"of \d+ samples tried.*max_bad_share 0.05: .*caption empty.*y in"):
            take(reader, 100)
    else:
        take(reader, 100)


def test_a_few_bad_samples_at_the_start_may_be_chance():
    """3 of 10 are no proof of more than 0.1, nor are 18 of 100; 28 of 110 are."""
    tally = Tally(0.1)
    tally.add(Batch(torch.zeros(0), [""] * 7, [], bad=3), whole=True)
    tally.add(Batch(torch.zeros(0), [""] * 75, [], bad=15), whole=True)
    with pytest.raises(DataError, match="28 of 110 samples"):
        tally.add(Batch(torch.zeros(0), [], [], bad=10), whole=True)


def test_a_lost_shard_counts_as_one():
    """A process that has the samples of four shards to read loses one: a quarter of its samples, but one shard."""
    tally, lost = Tally(0.1), Skip("3.tar", "all of it", "shard unreachable", "")
    for _ in range(100):
        tally.add(Batch(torch.zeros(0), ["", "", ""], [lost], 0, frozenset(range(4))), whole=True)
    others = [Skip(f"{i}.tar", "all of it", "shard unreachable", "") for i in range(3)]
    with pytest.raises(DataError, match=r"4 of 4 shards tried.*max_bad_share 0.1: shard unreachable"):
        tally.add(Batch(torch.zeros(0), [""], others, 0, frozenset(range(4))), whole=True)


def test_a_shard_that_goes_away_is_a_counted_skip(reader_of, pictures_of):
    gone = pictures_of("b.tar", 2)
    reader = reader_of(pictures_of("a.tar", 2), gone)
    gone.unlink()
    taken = take(reader, 6)
    assert set(captions(taken)) == {"a0", "a1"}
    assert {(skip.shard, skip.reason) for batch in taken for skip in batch.skipped} == {(str(gone), "shard unreadable")}


def test_a_shard_that_comes_back_is_read_again(reader_of, pictures_of):
    shard = pictures_of("b.tar", 2)
    reader = reader_of(pictures_of("a.tar", 2), shard)
    stream = batches(SampleStream(reader, np.arange(4), 3, 0.0), 4, first_chunk=0, rank=0, world_size=1, workers=0)
    away = shard.rename(shard.with_suffix(".away"))
    assert set(next(stream).captions) == {"a0", "a1"}
    away.rename(shard)
    assert set(next(stream).captions) == {"a0", "a1", "b0", "b1"}


def test_a_shard_that_gets_out_of_reach_is_a_counted_skip(reader_of, pictures_of, tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0,))
    gone = pictures_of("b.tar", 2)
    reader = reader_of(pictures_of("a.tar", 2), f"pipe:cat {gone}")
    gone.unlink()
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    taken = take(reader, 6, workers=1)
    assert set(captions(taken)) == {"a0", "a1"}
    [skip] = {skip for batch in taken for skip in batch.skipped}
    assert (skip.shard, skip.key, skip.reason) == (f"pipe:cat {gone}", "all of it", "shard unreachable")


def test_a_sample_is_held_out_by_the_hash_of_its_key_alone(pictures_of):
    few = ShardedSamples([scan(str(pictures_of("a.tar", 100)))])
    many = ShardedSamples([scan(str(pictures_of("b.tar", 300))), *few.shards])
    held = {int(i) for i in split(few, 0.2)[1]}
    assert held == {i for i in range(100) if hash_of(f"a{i}") < 0.2 * 2**64}
    assert {int(i) - 300 for i in split(many, 0.2)[1] if i >= 300} == held


def test_the_stated_share_is_held_out(pictures_of):
    training, validation = split(ShardedSamples([scan(str(pictures_of("a.tar", 1000)))]), 0.1)
    assert 70 < len(validation) < 130  # 100 ± 3 standard deviations
    assert sorted([*training, *validation]) == list(range(1000))


def test_nothing_need_be_held_out(pictures_of):
    training, validation = split(ShardedSamples([scan(str(pictures_of("a.tar", 3)))]), 0)
    assert (len(training), len(validation)) == (3, 0)


def test_something_must_be_left_to_train_on(pictures_of):
    with pytest.raises(DataError, match=r"holdout is 0\.99999; it leaves none of the 1 samples"):
        split(ShardedSamples([scan(str(pictures_of("a.tar", 1)))]), 0.99999)
