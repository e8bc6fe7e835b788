"""The report on clips, of a tiny untrained model and a few made clips."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.made_data import encode_frames, write_shard
from tests.models.small_pipelines import CLIP_MODEL, small_pipeline


@pytest.fixture
def report(recipe):
    return recipe("emoji_clips_report")


def test_the_report_has_shares_a_distance_and_grids_that_move(report, tmp_path, capsys):
    rng = np.random.default_rng(0)
    made = {
        f"clip-{i}": {"mp4": encode_frames(list(rng.integers(0, 256, (24, 32, 32, 3), np.uint8))), "txt": b"a cat"}
        for i in range(12)
    }
    shard = write_shard(tmp_path / "a.tar", made)
    small_pipeline(CLIP_MODEL).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--data", str(shard), "--holdout", "0.5", "--out", str(tmp_path)]
    assert report.main([*arguments, "--steps", "2", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert results.keys() == {
        *("held_out_clips", "nearest_is_right", "right_of_5"),
        "frechet_video_efficientnet_lite0",
    }
    assert results["held_out_clips"] > 1
    for name in ("held_out", "trained"):
        with Image.open(tmp_path / f"{name}.webp") as grid:
            assert grid.n_frames == 4
            assert grid.width == 8 * (2 * 64 + 8)
    assert "nearest_is_right" in capsys.readouterr().out


def test_a_model_of_pictures_is_refused(report, tmp_path, capsys):
    small_pipeline().save_pretrained(tmp_path / "model")
    assert report.main([str(tmp_path / "model"), "--data", "a.tar", "--out", str(tmp_path)]) == 2
    assert "recipes/emoji_report.py" in capsys.readouterr().err
