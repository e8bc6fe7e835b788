"""What the recipe for one's own pictures chooses by their number."""

import numpy as np
import pytest

from mdm_models.commands.train import parse
from mdm_models.training.config import plan
from tests.made_data import encode_image, write_shard


@pytest.fixture
def t2i(recipe):
    return recipe("t2i")


def chosen(t2i, data: str, *more: str):
    return parse("t2i", t2i.PRESETS, t2i.__doc__, ["--data", data, "--out", "run", *more])[0]


def of(t2i, monkeypatch, count: int):
    monkeypatch.setattr(t2i, "count_samples", lambda shards: count)
    return chosen(t2i, "a.tar")


def test_more_pictures_are_given_more_steps_in_larger_batches(t2i, monkeypatch):
    few, more, many = (of(t2i, monkeypatch, count) for count in (50, 1000, 100_000))
    assert few.optimizer.steps < more.optimizer.steps < many.optimizer.steps
    assert few.optimizer.batch_size < many.optimizer.batch_size
    assert few.optimizer.ema_decay < more.optimizer.ema_decay < many.optimizer.ema_decay
    assert few.data.holdout == 0 < more.data.holdout
    for config in (few, more, many):
        plan(config)


def test_pictures_are_counted_in_folders_and_shards(t2i, tmp_path, capsys):
    (tmp_path / "own" / "cat").mkdir(parents=True)
    picture = encode_image(np.zeros((16, 16, 3), np.uint8))
    for number in range(3):
        (tmp_path / "own" / "cat" / f"{number}.png").write_bytes(picture)
    chosen(t2i, str(tmp_path / "own"))
    assert capsys.readouterr().out.startswith("own-small for 3 pictures: ")
    chosen(t2i, str(write_shard(tmp_path / "a.tar", {key: {"png": picture, "txt": b"a"} for key in "ab"})))
    assert capsys.readouterr().out.startswith("own-small for 2 pictures: ")


def test_options_replace_what_was_chosen(t2i, monkeypatch):
    monkeypatch.setattr(t2i, "count_samples", lambda shards: 200)
    config = chosen(t2i, "a.tar", "--steps", "7", "--batch-size", "2")
    assert (config.optimizer.steps, config.optimizer.batch_size) == (7, 2)
    assert config.data.shards == ("a.tar",)


@pytest.mark.parametrize(
    ("shipped", "begins"),
    [
        (["mdm_t2i_emoji_16", "mdm_t2i_emoji_64"], "mdm_t2i_emoji_64"),
        (["mdm_t2i_emoji_16"], "mdm_t2i_emoji_16"),
        ([], ""),
    ],
)
def test_it_begins_from_the_largest_shipped_weights_that_fit_and_says_which(t2i, monkeypatch, capsys, shipped, begins):
    monkeypatch.setattr(t2i, "list_models", lambda pretrained: shipped)
    assert of(t2i, monkeypatch, 200).model.init_from == begins
    assert (f"begins from the shipped {begins}" if begins else "begins fresh") in capsys.readouterr().out
