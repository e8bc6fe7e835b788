"""The report on a tiny untrained model and a few made drawings."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.made_data import encode_image, write_shard
from tests.models.small_pipelines import small_pipeline

STYLES = ("noto", "flat", "3d", "blob")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Three names in four styles, a colour each; and one name in a single style."""
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, dict[str, bytes]]] = {"train": {}, "held-out": {}}
    for i, name in enumerate(("red apple", "penguin", "anchor")):
        for style in STYLES:
            pixels = np.clip(np.eye(3)[i] * 200 + rng.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
            part = made["held-out" if style == "blob" else "train"]
            part[f"{name.replace(' ', '-')}-{style}"] = sample(name, style, pixels)
    made["held-out"]["comet-noto"] = sample("comet", "noto", np.zeros((64, 64, 3), np.uint8))
    folder = tmp_path_factory.mktemp("shards")
    return {part: str(write_shard(folder / f"{part}.tar", samples)) for part, samples in made.items()}


def sample(name: str, style: str, pixels: np.ndarray) -> dict[str, bytes]:
    facts = json.dumps({"name": name, "style": style, "group": "object"}).encode()
    return {"webp": encode_image(pixels, "webp"), "txt": f"{name}, {style} style".encode(), "json": facts}


@pytest.fixture
def emoji_report(recipe):
    return recipe("emoji_report")


def test_only_names_that_four_styles_draw_are_asked_for_and_compared_with_another_style(emoji_report, shards, tmp_path):
    options = emoji_report.Options(tmp_path, (shards["train"],), tmp_path, held_out=(shards["held-out"],), holdout=0.0)
    chosen = emoji_report.choose(*emoji_report.drawings(options), options)
    assert sorted(each.caption for each in chosen.held_out) == [
        "anchor, blob style",
        "penguin, blob style",
        "red apple, blob style",
    ]
    assert [each.name for each in chosen.others] == [each.name for each in chosen.held_out]
    assert all(each.style != "blob" for each in (*chosen.others, *chosen.trained))


def test_the_report_has_shares_for_samples_and_for_real_pictures_a_distance_and_grids(
    emoji_report, shards, tmp_path, capsys
):
    small_pipeline().save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--data", shards["train"], "--held-out", shards["held-out"]]
    arguments += ["--holdout", "0", "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert emoji_report.main(arguments) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert results.keys() == {
        "nearest_is_right",
        "right_of_5",
        "reference_nearest_is_right",
        "reference_right_of_5",
        "frechet_efficientnet_lite0",
    }
    assert results["reference_nearest_is_right"] == 1  # the colours tell the names apart
    assert results["right_of_5"] == 1  # of three
    assert "nearest_is_right" in capsys.readouterr().out
    for name in ("held_out", "trained"):
        with Image.open(tmp_path / f"{name}.webp") as sheet:
            assert sheet.width == 8 * (2 * 64 + 8)


def test_data_without_styles_are_named(emoji_report, tmp_path, capsys):
    picture = encode_image(np.zeros((64, 64, 3), np.uint8))
    shard = write_shard(tmp_path / "a.tar", {key: {"png": picture, "txt": b"a cat"} for key in "abcd"})
    small_pipeline().save_pretrained(tmp_path / "model")
    assert emoji_report.main([str(tmp_path / "model"), "--data", str(shard), "--out", str(tmp_path)]) == 2
    assert "is not one of `mdm prepare emoji`" in capsys.readouterr().err
