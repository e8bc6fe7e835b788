import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models import Pipeline, cli, zoo
from mdm_models.config import UNetConfig
from mdm_models.errors import CheckpointError
from mdm_models.storage import opened
from mdm_models.training.config import changed
from mdm_models.training.trainer import train
from tests.made_data import encode_image, write_shard
from tests.training.models import IMAGE_MODEL, NESTED_MODEL, settings

NESTED_AROUND = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=NESTED_MODEL)

CAPTIONS = {"a": "red apple, noto style", "b": "penguin, flat style"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on two pictures."""
    folder = tmp_path_factory.mktemp("trained")
    picture = encode_image(np.zeros((16, 16, 3), np.uint8))
    shard = write_shard(
        folder / "a.tar", {key: {"png": picture, "txt": text.encode()} for key, text in CAPTIONS.items()}
    )
    return train(changed(settings(shard, folder / "run"), frames=1, steps=2), NESTED_MODEL)


def ship(run: Path, out: Path, *more: str) -> int:
    (about := out.with_name("about.md")).write_text("Draws apples. Data: mine, MIT. Limits: two steps.\n")
    told = ["--about", str(about), "--command", "python recipe.py --seed 0", "--machine", "an abacus"]
    return cli.main(["ship", str(run), "mdm_small", "--out", str(out), *told, *more])


def test_a_run_becomes_a_folder_in_bfloat16_with_the_captions_words_alone(run, tmp_path):
    assert ship(run, tmp_path / "weights") == 0
    folder = tmp_path / "weights" / "mdm_small"
    for path in folder.rglob("*.safetensors"):
        with opened(path) as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    shipped, trained = (Pipeline.from_pretrained(each, dtype=torch.float32) for each in (folder, run / "model"))
    assert len(shipped.text_encoder.embedding.weight) == 11 + 1  # 8 words and marks, start, end, padding; the others
    prompts = [*CAPTIONS.values(), ""]
    torch.testing.assert_close(shipped.text_encoder(prompts), trained.text_encoder(prompts), rtol=0.02, atol=0.02)


def test_the_card_tells_data_architecture_command_seed_hours_machine_evaluation_and_limits(run, tmp_path):
    (run / "evaluation.json").write_text(json.dumps({"settings": {}, "results": {"nearest_is_right": 0.71}}))
    (run / "held_out.webp").write_bytes(b"pictures")
    assert ship(run, tmp_path / "weights") == 0
    card = (tmp_path / "weights" / "mdm_small" / "README.md").read_text()
    for told in (
        "# mdm_small",
        "Data: mine, MIT. Limits: two steps.",
        "2 nested resolutions",
        "* 16 × 16: channels (32, 32)",
        "2 steps, 4 samples",
        "in 0 minutes on an abacus, seed 0",
        "    python recipe.py --seed 0\n",
        "| nearest is right | 0.71 |",
        "(held_out.webp)",
    ):
        assert told in card


def test_the_card_of_a_second_stage_tells_what_the_first_one_learned(run, tmp_path):
    config = changed(settings(run.parent / "a.tar", tmp_path / "second"), frames=1, steps=1, init_from=str(run))
    ship(train(config, NESTED_AROUND), tmp_path / "weights")
    card = (tmp_path / "weights" / "mdm_small" / "README.md").read_text()
    assert "It began as run had become in 2 steps, 4 samples (2.0 epochs)" in card


def test_guidance_may_be_another_than_the_previews(run, tmp_path):
    assert ship(run, tmp_path / "weights", "--guidance-scale", "3.5") == 0
    assert Pipeline.from_pretrained(tmp_path / "weights" / "mdm_small").config.guidance_scale == 3.5


def test_training_goes_on_from_a_shipped_model(run, tmp_path):
    ship(run, tmp_path / "weights")
    config = settings(run.parent / "a.tar", tmp_path / "on")
    config = changed(config, frames=1, steps=1, lr=1e-9, init_from=str(tmp_path / "weights" / "mdm_small"))
    before, after = (
        Pipeline.from_pretrained(path / "model", dtype=torch.float32) for path in (run, train(config, NESTED_MODEL))
    )
    for key, weight in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[key], weight, rtol=0.01, atol=1e-4)
    prompts = list(CAPTIONS.values())
    torch.testing.assert_close(after.text_encoder(prompts), before.text_encoder(prompts), rtol=0.02, atol=0.02)


def test_a_shipped_model_of_another_architecture_is_no_beginning(run, tmp_path):
    ship(run, tmp_path / "weights")
    config = settings(run.parent / "a.tar", tmp_path / "on")
    config = changed(config, frames=1, init_from=str(tmp_path / "weights" / "mdm_small"))
    with pytest.raises(CheckpointError, match="neither this model nor one nested"):
        train(config, IMAGE_MODEL)


def test_of_a_run_that_goes_on_its_newest_checkpoint_is_shipped(run, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo._CONFIGS, "small", lambda: NESTED_MODEL)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    assert ship(tmp_path / "run", tmp_path / "a") == 0
    assert ship(run, tmp_path / "b") == 0
    first, second = (tmp_path / out / "mdm_small" for out in ("a", "b"))
    for file in ("model.safetensors", "pipeline.json", "text_encoder/model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_run_without_a_model_is_named(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert ship(tmp_path / "run", tmp_path / "weights") == 2
    assert "has left no model yet" in capsys.readouterr().err
