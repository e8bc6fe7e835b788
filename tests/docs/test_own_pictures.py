"""docs/tutorials/own_pictures.md, executed as it is written, with a smaller model for fewer steps."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mdm_models import cli
from tests.made_data import encode_image

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "own_pictures.md"
SMALL = {
    "train": "--model mdm_t2i_tiny_64 --text-width 64 --init-from= --steps 2 --batch-size 4 --sample-count 1 "
    "--sample-steps 1 --device cpu --precision float32",
    "sample": "--steps 1 --device cpu",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the reader has put four captioned pictures."""
    (tmp_path / "PICTURES").mkdir()
    for number, grey in enumerate((0, 80, 160, 240)):
        picture = encode_image(np.full((90, 70, 3), grey, np.uint8), "jpeg")
        (tmp_path / "PICTURES" / f"apple-{number}.jpg").write_bytes(picture)
        (tmp_path / "PICTURES" / f"apple-{number}.txt").write_text("a red apple on a table\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_leads_from_pictures_to_drawn_ones(folder, capsys):
    for program, name, *arguments in commands():
        assert program == "mdm"
        assert cli.main([name, *arguments, *shlex.split(SMALL.get(name, ""))]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "SHARDS: 4 samples in 1 shards, 0 skipped" in said
    assert re.search(r"4 pictures: 1000 steps of 16, each seen 4000 times", said)
    assert "2 steps to go: about " in said
    assert "RUN: 2 of 2 steps" in said
    assert len(list((folder / "DRAWN").glob("*.png"))) == 8
