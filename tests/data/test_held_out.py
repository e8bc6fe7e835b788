from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.data.held_out import HeldOut
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.processes import Processes
from tests.made_data import encode_image, write_shard

SIZE = 8


def grey(level: int) -> bytes:
    return encode_image(np.full((SIZE, SIZE, 3), level, np.uint8))


@pytest.fixture
def shard_of(tmp_path: Path) -> Callable[..., Path]:
    """shard_of("a.tar", 3) writes grey pictures of 0, 1, 2, captioned a0, a1, a2; extra samples may be given by key."""

    def write(name: str, count: int, **extra: dict[str, bytes]) -> Path:
        stem = name.removesuffix(".tar")
        samples = {f"{stem}{i}": {"png": grey(i), "txt": f"{stem}{i}".encode()} for i in range(count)}
        return write_shard(tmp_path / name, samples | extra)

    return write


def held_out(
    *shards: Path, count: int = 100, batch_size: int = 4, rank: int = 0, world_size: int = 1, **options
) -> HeldOut:
    config = DataConfig(tuple(map(str, shards)), size=SIZE)
    reader = SampleReader(ShardedSamples(open_shards(config)), config, options.pop("prompts", "caption"))
    processes = Processes(rank, world_size, torch.device("cpu"))
    return HeldOut(reader, np.arange(len(reader.samples)), count, batch_size, processes, **{"keep": False} | options)


def captions(of: HeldOut) -> list[str]:
    """Of the samples that count."""
    return [batch.captions[row] for batch in of.batches(0) for row in batch.rows]


def test_ranks_share_the_samples_that_one_process_has(shard_of):
    shard = shard_of("a.tar", 7)
    shares = [captions(held_out(shard, rank=rank, world_size=3)) for rank in range(3)]
    together = [caption for share in shares for caption in share]
    assert together == captions(held_out(shard))
    assert sorted(together) == [f"a{i}" for i in range(7)]


def test_all_ranks_have_batches_of_the_same_sizes(shard_of):
    shard = shard_of("a.tar", 7)
    ranks = [held_out(shard, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [[len(batch.images) for batch in rank.batches(0)] for rank in ranks] == [[2, 1]] * 3


def test_a_number_stands_for_the_same_sample_on_any_number_of_ranks(shard_of):
    shard = shard_of("a.tar", 7)

    def numbered(world_size: int) -> dict[int, str]:
        shares = [held_out(shard, rank=rank, world_size=world_size) for rank in range(world_size)]
        batches = [batch for share in shares for batch in share.batches(0)]
        return {n: caption for batch in batches for n, caption in zip(batch.numbers, batch.captions, strict=True)}

    assert numbered(1).items() <= numbered(3).items()


def test_images_captions_and_prompts_belong_together(shard_of):
    [batch] = held_out(shard_of("a.tar", 3)).batches(0)
    assert batch.images.shape == (3, 3, SIZE, SIZE)
    assert [f"a{level}" for level in batch.images[:, 0, 0, 0].tolist()] == batch.captions == batch.prompts


def test_few_samples_come_from_few_shards(shard_of):
    shards = [shard_of(f"{letter}.tar", 4) for letter in "abcdef"]
    found = captions(held_out(*shards, count=8))
    assert len(found) == 8
    assert len({caption[0] for caption in found}) == 2


def test_a_sample_that_cannot_be_used_does_not_count(shard_of):
    shard = shard_of("a.tar", 2, broken={"png": b"no picture", "txt": b"broken"})
    [batch] = held_out(shard).batches(0)
    assert len(batch.rows) == 2
    assert batch.images.shape[0] == 3
    assert sorted(captions(held_out(shard))) == ["a0", "a1"]


def test_what_is_kept_is_not_read_again(shard_of):
    shard = shard_of("a.tar", 3)
    kept = held_out(shard, keep=True)
    first = captions(kept)
    shard.unlink()
    assert captions(kept) == first


def test_prompts_may_be_the_names_of_precomputed_features(shard_of):
    [batch] = held_out(shard_of("a.tar", 2), prompts="name").batches(0)
    assert batch.prompts == [f"a/{caption}" for caption in batch.captions]


def test_a_class_is_captioned_by_its_name(shard_of):
    labelled = {"png": grey(1), "cls": b"7", "txt": b"seven"}
    [batch] = held_out(shard_of("a.tar", 0, a=labelled), prompts="class").batches(0)
    assert (batch.prompts, batch.captions) == (["7"], ["seven"])


def test_worker_processes_read_the_same(shard_of):
    shard = shard_of("a.tar", 5)
    [here], [there] = held_out(shard, batch_size=5).batches(0), held_out(shard, batch_size=5).batches(2)
    assert torch.equal(here.images, there.images)
    assert here.captions == there.captions
