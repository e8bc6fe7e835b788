import dataclasses
from pathlib import Path

import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.processes import Processes
from mdm_models.training.config import OutputConfig
from mdm_models.training.monitor.preview import Preview
from tests.made_data import PICTURE, write_shard

HERE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def reader(tmp_path: Path) -> SampleReader:
    """Three pictures, the first of which cannot be read."""
    samples = {key: {"png": PICTURE, "txt": key.encode()} for key in "abc"}
    samples["a"]["png"] = b"no picture"
    config = DataConfig((str(write_shard(tmp_path / "a.tar", samples)),), size=16, holdout=0)
    return SampleReader(ShardedSamples(open_shards(config)), config)


def test_it_shows_the_first_samples_that_are_usable(reader):
    assert Preview.of(OutputConfig(sample_count=1), reader, range(3), HERE).captions == ["b"]
    assert Preview.of(OutputConfig(sample_count=4), reader, range(3), HERE).captions == ["b", "c"]


def test_captions_are_shown_where_the_text_encoder_reads_names(reader):
    preview = Preview.of(OutputConfig(sample_count=1), dataclasses.replace(reader, prompts="name"), range(3), HERE)
    assert preview.captions == ["b"]
    assert preview.prompts == ["a/b"]


def test_there_is_none_without_a_usable_sample_or_unless_asked_for(reader):
    assert Preview.of(OutputConfig(), reader, range(1), HERE) is None
    assert Preview.of(OutputConfig(sample_every=0), reader, range(3), HERE) is None


def test_all_processes_show_what_the_leading_one_has_read(reader):
    class Follower(Processes):
        def gather(self, items: list) -> list:
            return [(torch.zeros(3, 1, 16, 16, dtype=torch.uint8), "read elsewhere", "a/a"), *items]

    assert Preview.of(OutputConfig(), reader, range(3), Follower(1, 2, HERE.device)).captions == ["read elsewhere"]
