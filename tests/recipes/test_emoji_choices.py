"""The table of short trainings, with choices and drawings that take seconds."""

import json

import numpy as np
import pytest

from tests.made_data import encode_image, write_shard

STYLES = "noto", "flat", "3d", "blob"


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    """Forty drawings, ten names in four styles, of which a share is held out."""
    rng = np.random.default_rng(0)
    samples = {}
    for name in range(10):
        for style in STYLES:
            facts = json.dumps({"name": f"thing {name}", "style": style, "group": "object"}).encode()
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            caption = f"thing {name}, {style} style".encode()
            samples[f"{name}-{style}"] = {"webp": encode_image(pixels, "webp"), "txt": caption, "json": facts}
    return str(write_shard(tmp_path_factory.mktemp("shards") / "train.tar", samples))


@pytest.mark.slow
def test_choices_are_trained_for_their_time_measured_once_and_set_beside_each_other(
    recipe, shard, tmp_path, monkeypatch, capsys
):
    choices = recipe("emoji_choices")
    small = "--holdout 0.2 --batch-size 2 --text-width 16"
    one = choices.Choice("one stage", (f"--preset 16 {small}",))
    two = choices.Choice("two stages", (f"--preset 16 {small}", f"--preset 64 {small}"))
    monkeypatch.setattr(choices, "CHOICES", (one, two))
    arguments = ["--data", shard, "--out", str(tmp_path), "--minutes", "0.4", "--captions", "4", "--steps", "1"]
    assert choices.main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| one stage", "| two stages"]
    measured = json.loads((tmp_path / "choices.json").read_text())
    assert all(row["samples_seen"] > 0 and 0 < row["error_900"] < 10 for row in measured.values())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert choices.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_a_training_that_ends_by_itself_is_an_error_that_says_why(recipe, tmp_path):
    choices = recipe("emoji_choices")
    with choices.Trainings() as trainings, pytest.raises(Exception, match=r"ended with code 2 and said: .*no-such"):
        trainings.train(["--data", str(tmp_path / "no-such.tar"), "--out", str(tmp_path / "run")], 60, tmp_path / "run")


def test_a_line_of_the_table(recipe):
    numbers = {"samples_seen": 1200, "error_500": 0.05, "error_900": 0.2, "right_of_5": 0.25}
    line = recipe("emoji_choices").row("a", numbers | {"frechet_efficientnet_lite0": 301.2})
    assert line == "| a | 1,200 | 0.0500 | 0.2000 | 0.25 | 301 |"
