"""A file of prompts, drawn by several processes, stopped and gone on with."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mdm_models import cli
from mdm_models.commands import sample
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder
from mdm_models.unet import build_model
from tests import forked
from tests.training.models import NESTED_MODEL

PROMPTS = ["a cat", "a dog", "", "an ant", "a bee"]
HOW = ["--steps", "1", "--seed", "3", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model (images of 16²) and prompts.txt."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sample")
    model = build_model(NESTED_MODEL)
    with torch.no_grad():
        for parameter in model.parameters():  # its output layers begin at 0
            parameter.normal_(std=0.05)
    encoder = TransformerTextEncoder(32, 1, max_tokens=8)
    Pipeline(model, encoder, PipelineConfig(size=16)).save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8-sig")
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [str(folder / "model"), "--prompts", str(folder / "prompts.txt"), "--out", str(out), *HOW, *more]


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(out.glob("*.png"))}


@pytest.fixture(scope="module")
def drawn(folder) -> dict[str, bytes]:
    """What one process draws at once."""
    assert cli.main(["sample", *arguments(folder, folder / "drawn")]) == 0
    return pictures(folder / "drawn")


def test_a_picture_is_of_its_line_and_its_number(folder, drawn):
    assert list(drawn) == [f"{number:06d}.png" for number in range(5)]
    alone = Pipeline.from_pretrained(folder / "model")(PROMPTS, num_inference_steps=1, seed=3, progress=False)
    assert [picture.tobytes() for picture in alone] == list(drawn.values())


def test_two_processes_draw_what_one_does(folder, drawn, tmp_path):
    command, said = ["sample", *arguments(folder, tmp_path / "out")], [tmp_path / "0", tmp_path / "1"]
    ended = forked.run_together(forked.mdm, *((command, *each) for each in zip(forked.world(2), said, strict=True)))
    assert ended == [0, 0], [path.read_text() for path in said]
    assert pictures(tmp_path / "out") == drawn


def test_the_same_command_draws_what_is_missing_and_leaves_the_rest(folder, drawn, tmp_path, monkeypatch):
    saved = []

    def save(picture, path, save=sample._save):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path)

    monkeypatch.setattr(sample, "_save", save)
    assert cli.main(["sample", *arguments(folder, tmp_path / "out")]) == 130
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert len(times) == 3
    assert cli.main(["sample", *arguments(folder, tmp_path / "out")]) == 0
    assert pictures(tmp_path / "out") == drawn
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_several_pictures_of_a_prompt_have_numbers_side_by_side(folder, tmp_path):
    assert cli.main(["sample", *arguments(folder, tmp_path / "out", "--count", "2")]) == 0
    found = pictures(tmp_path / "out")
    assert len(found) == len(set(found.values())) == 10


def test_a_prompt_is_what_an_editor_shows_as_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a\u2028cat\r\na\x0cdog\0\r\n".encode("utf-16"))
    assert sample._lines(tmp_path / "prompts.txt") == ["a\u2028cat", "a\x0cdog"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "4"], "was begun with seed 3, not 4"),
        (["--steps", "2"], "was begun with steps 1, not 2"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", os.devnull], "is empty"),
        (["--format", "mp4"], "--format mp4: the model makes pictures"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_what_the_user_can_mend_is_one_line(folder, drawn, capsys, change, message):
    assert cli.main(["sample", *arguments(folder, folder / "drawn", *change)]) == 2
    assert message in capsys.readouterr().err
    assert pictures(folder / "drawn") == drawn
