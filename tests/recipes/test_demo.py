"""The demo, with small untrained models in the place of the shipped ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdm_models import shipped, zoo
from mdm_models.recipes.t2v_webvid import tiny
from mdm_models.training.config import changed
from tests.made_data import encode_clip, write_shard
from tests.models.small_pipelines import CLIP_MODEL, NESTED_MODEL, save_as_shipped


@pytest.fixture
def demo(recipe, monkeypatch):
    demo = recipe("demo")
    monkeypatch.setattr(demo, "FIRST", 2)
    return demo


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """The folder of shipped models, empty."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def clips(tmp_path) -> str:
    made = {key: {"mp4": encode_clip(), "txt": text.encode()} for key, text in (("a", "red apple"), ("b", "penguin"))}
    return str(write_shard(tmp_path / "clips.tar", made))


def run(demo, out: Path, clips: str) -> int:
    return demo.main(["--out", str(out), "--data", clips, "--seconds", "0.1"])


def frames(path: Path) -> int:
    with Image.open(path) as picture:
        return getattr(picture, "n_frames", 1)


def test_every_shipped_model_is_drawn_at_all_sizes_and_the_video_model_taught(
    demo, weights, clips, tmp_path, monkeypatch, capsys
):
    for name, config in {"mdm_t2v_small": CLIP_MODEL, "mdm_t2i_small": NESTED_MODEL}.items():
        save_as_shipped(weights, name, config)
        monkeypatch.setitem(zoo._CONFIGS, name, lambda config=config: config)
    assert run(demo, tmp_path / "out", clips) == 0
    assert frames(tmp_path / "out" / "mdm_t2i_small.webp") == 1
    assert frames(tmp_path / "out" / "mdm_t2v_small.webp") > 1
    assert frames(tmp_path / "out" / "taught.webp") > 1
    shown = capsys.readouterr().out
    assert "teaching mdm_t2v_small 2 clips" in shown
    for name in ("mdm_t2i_small", "mdm_t2v_small", "taught"):
        assert str(tmp_path / "out" / f"{name}.webp") in shown


def test_what_is_taught_begins_at_the_shipped_weights(demo, weights, clips, tmp_path, monkeypatch):
    save_as_shipped(weights, "mdm_t2i_small", NESTED_MODEL)
    monkeypatch.setitem(zoo._CONFIGS, "mdm_t2i_small", lambda: NESTED_MODEL)
    options = demo.Options(tmp_path / "out", data=(clips,))
    config, name = demo.settings(options)
    assert (name, config.model.init_from, config.data.frames) == ("mdm_t2i_small", "mdm_t2i_small", 1)
    kept = []
    monkeypatch.setattr(demo, "train_for", lambda config, _: kept.append(config) or shipped.shipped_or(name).parent)
    monkeypatch.setattr(demo, "save_grid", lambda _, rows, *more: kept.append(rows))
    save_as_shipped(weights, "model", NESTED_MODEL)  # as if training had changed nothing
    demo.teach(options)
    rows = kept[-1]
    np.testing.assert_array_equal(rows["before"], rows["after"])
    assert list(rows) == ["real", "before", "after"]


def test_the_same_command_again_teaches_on(demo, weights, clips, tmp_path, monkeypatch):
    save_as_shipped(weights, "mdm_t2i_small", NESTED_MODEL)
    monkeypatch.setitem(zoo._CONFIGS, "mdm_t2i_small", lambda: NESTED_MODEL)
    for _ in range(2):
        assert run(demo, tmp_path / "out", clips) == 0
    assert len(demo._step_seconds(tmp_path / "out" / "tuned")) >= 6


def test_without_shipped_models_one_is_taught_from_nothing(demo, weights, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(zoo._CONFIGS, "mdm_t2v_tiny", lambda: CLIP_MODEL)
    small = {"batch_size": 1, "frames": 4, "size": 16, "text_width": 32}
    monkeypatch.setattr(demo, "tiny", lambda *given: changed(tiny(*given), **small))
    assert run(demo, tmp_path / "out", clips) == 0
    assert "teaching mdm_t2v_tiny 2 clips" in capsys.readouterr().out
    assert (tmp_path / "out" / "taught.webp").exists()
