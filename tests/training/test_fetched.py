"""Models in object stores."""

import json
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from mdm_models import cli
from mdm_models.errors import CheckpointError
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.checkpoint.checkpoints import load_averages
from mdm_models.training.checkpoint.store import Store
from mdm_models.training.config import changed
from mdm_models.training.fetched import on_this_machine
from mdm_models.training.trainer import train
from mdm_models.unet import build_model
from tests.made_data import encode_image, write_shard
from tests.training.models import LEAST_NESTED_MODEL, settings

URL = "memory://bucket/run"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Store:
    """A run in a store, which left a model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    encoder = TransformerTextEncoder(32, 1, max_tokens=8)
    pipeline = Pipeline(build_model(LEAST_NESTED_MODEL), encoder, PipelineConfig(size=16))
    pipeline.save_pretrained(tmp_path / "model")
    store = Store(URL)
    for path in (tmp_path / "model").rglob("*.*"):
        store.put(path, f"model/{path.relative_to(tmp_path / 'model')}")
    store.write("config.json", json.dumps({"optimizer": {}}).encode())
    store.write("checkpoints/step-00000001/manifest.json", b"")
    yield store
    fsspec.filesystem("memory").store.clear()


def test_a_model_in_a_store_is_sampled(run, tmp_path):
    assert cli.main(["sample", URL, "a cat", "--steps", "1", "--seed", "1", "--out", str(tmp_path / "there.png")]) == 0
    local = ["sample", str(tmp_path / "model"), "a cat", "--steps", "1", "--seed", "1"]
    assert cli.main([*local, "--out", str(tmp_path / "here.png")]) == 0
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_what_has_changed_is_copied_again_and_nothing_else(run, tmp_path, monkeypatch):
    folder = on_this_machine(URL)
    assert not (folder / "checkpoints").exists()
    run.write("model/pipeline.json", json.dumps({"format_version": 1, "size": 32}).encode())
    copied = []

    def get(self, name, path, get=Store.get):
        copied.append(name)
        get(self, name, path)

    monkeypatch.setattr(Store, "get", get)
    assert on_this_machine(URL) == folder
    assert copied == ["model/pipeline.json"]
    assert PipelineConfig.load(folder / "model").size == 32


def test_a_run_begins_from_a_model_in_a_store(run, tmp_path):
    shard = shard_of_noise(tmp_path)
    ended = []
    for init_from in (URL, str(tmp_path / "model")):
        config = changed(settings(shard, tmp_path / f"run-{len(ended)}"), frames=1, steps=1, init_from=init_from)
        ended.append(load_averages(train(config, LEAST_NESTED_MODEL)))
    assert all(torch.equal(weight, ended[1][name]) for name, weight in ended[0].items())
    config = changed(config, out=str(tmp_path / "none"), init_from="memory://bucket/nowhere")
    with pytest.raises(CheckpointError, match="init_from memory://bucket/nowhere: there is no model"):
        train(config, LEAST_NESTED_MODEL)


def shard_of_noise(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    return write_shard(folder / "a.tar", {key: {"png": encode_image(pixels), "txt": b"a cat"} for key in "ab"})


def test_what_copies_a_model_is_not_needed_for_one_that_is_here(monkeypatch):
    for name in ("fsspec", "filelock"):
        monkeypatch.setitem(sys.modules, name, None)
    assert on_this_machine("mdm_t2i_emoji_64") == "mdm_t2i_emoji_64"


def test_a_store_without_a_model_is_named(run, capsys):
    assert cli.main(["sample", "memory://bucket/nowhere", "a cat"]) == 2
    assert "memory://bucket/nowhere: there is no model" in capsys.readouterr().err
