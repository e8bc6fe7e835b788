import json
from pathlib import Path

import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.data.media import BadSample, Cut
from mdm_models.data.reader import SampleReader, Skip, caption_of, prompts_for
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.text import ClassLabels, PrecomputedText
from tests.made_data import PICTURE, write_shard

SAMPLE = Path(__file__).parents[2] / "recipes" / "data"


def reader_of(*shards: Path, prompts: str = "caption", **config) -> SampleReader:
    config = DataConfig(tuple(map(str, shards)), **({"frames": 4, "size": 16} | config))
    return SampleReader(ShardedSamples(open_shards(config)), config, prompts)


def test_a_clip_begins_where_it_is_asked_to(shard_of):
    reader = reader_of(shard_of("a.tar", 1))
    early, late = reader.read(0, 0.0)[0], reader.read(0, 0.999)[0]
    assert late.float().mean() > early.float().mean() + 100


def test_without_a_draw_a_clip_begins_where_the_settings_say(shard_of):
    shard = shard_of("a.tar", 1)
    assert torch.equal(reader_of(shard).read(0)[0], reader_of(shard).read(0, 0.0)[0])
    assert torch.equal(reader_of(shard, clip_start="middle").read(0)[0], reader_of(shard).read(0, 0.5)[0])


def test_a_cut_is_handed_on():
    reader = reader_of(SAMPLE / "images-000.tar", frames=1, size=64)
    assert torch.equal(reader.read(0, cut=Cut(mirrored=True))[0], reader.read(0)[0].flip(3))


def test_prompts_may_be_the_names_of_precomputed_features(shard_of):
    assert reader_of(shard_of("a.tar", 2), prompts="name").read(1)[1] == "a/a1"


def test_a_class_is_the_number_in_cls_whatever_the_caption(shard_of, clip):
    sample = {"mp4": clip, "txt": b"tench", "cls": b"0"}
    assert reader_of(shard_of("a.tar", 0, a=sample), prompts="class").read(0)[1] == "0"
    assert reader_of(shard_of("b.tar", 0, a=sample)).read(0)[1] == "tench"


def test_the_caption_is_in_words_whatever_the_text_encoder_reads(shard_of, clip):
    sample = {"mp4": clip, "txt": b"tench", "cls": b"0"}
    for prompts in ("caption", "class", "name"):
        assert reader_of(shard_of("a.tar", 0, a=sample), prompts=prompts).caption(0) == "tench"
    wordless = {"mp4": clip, "txt": b"\xff", "cls": b"0"}
    assert reader_of(shard_of("b.tar", 0, a=wordless), prompts="class").caption(0) == "0"


def test_a_class_may_be_named_by_the_caption(shard_of, clip):
    shard = shard_of("a.tar", 0, a={"mp4": clip, "txt": b"tench"})
    assert reader_of(shard, prompts="class").read(0)[1] == "tench"


def test_what_stands_for_the_text_follows_from_the_encoder():
    precomputed = PrecomputedText.__new__(PrecomputedText)  # without its files
    assert [prompts_for(encoder) for encoder in (ClassLabels(10), precomputed, None)] == ["class", "name", "caption"]


def test_an_image_is_too_short_for_a_clip_model():
    found = reader_of(SAMPLE / "images-000.tar").try_read(0)
    assert isinstance(found, Skip)
    assert found.reason == "too short"


def test_a_file_twice_in_a_sample_is_a_skip(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"a": {"png": PICTURE, "PNG": PICTURE, "txt": b"a"}})
    found = reader_of(shard, frames=1).try_read(0)
    assert isinstance(found, Skip)
    assert "duplicate" in found.detail


def test_damaged_shards_are_reported(shard_of):
    path = shard_of("a.tar", 3)
    path.write_bytes(path.read_bytes()[:-11000])
    [damage] = reader_of(path).damaged()
    assert (damage.shard, damage.reason) == (str(path), "shard damaged")


def test_links_that_were_dead_are_reported_by_their_number(shard_of):
    """As video2dataset leaves them."""
    failed = {"txt": b"a cat", "json": json.dumps({"status": "failed_to_download"}).encode()}
    reader = reader_of(shard_of("a.tar", 2, b=failed, c=failed))
    assert len(reader.samples) == 2
    assert [(skip.key, skip.reason) for skip in reader.damaged()] == [("2 samples", "no clip or image")]


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b" a cat\n"}, "a cat"),
        ({"json": json.dumps({"caption": "a dog"}).encode()}, "a dog"),
        ({"json": json.dumps({"text": "a cow"}).encode()}, "a cow"),
        ({"txt": "été".encode(), "json": b"{"}, "été"),
        ({"txt": b"", "json": json.dumps({"caption": "a dog", "status": "success"}).encode()}, "a dog"),
        ({"cls": b"207"}, "207"),
        ({"cls": b"207\n", "json": json.dumps({"caption": None}).encode()}, "207"),
    ],
)
def test_captions_come_from_text_or_json_or_the_class(files, caption):
    assert caption_of(files) == caption


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "caption missing"),
        ({"txt": b" \n"}, "caption empty"),
        ({"json": b"{}"}, "caption empty"),
        ({"txt": b"", "json": json.dumps({"caption": None, "status": None}).encode()}, "caption empty"),
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
