"""The command line that recipes share."""

import dataclasses
from pathlib import Path

import pytest

from mdm_models.commands.train import parse, run_recipe
from mdm_models.data.config import DataConfig
from mdm_models.training import trainer
from mdm_models.training.config import TrainConfig, changed

RECIPES = Path(__file__).parents[2] / "recipes"
CLIPS = RECIPES / "data" / "clips-000.tar"
ALL = pytest.mark.parametrize("name", ["imagenet_256", "t2i_cc12m", "t2v_webvid"])


@ALL
def test_help_explains_presets_and_options(recipe, capsys, name):
    module = recipe(name)
    with pytest.raises(SystemExit) as end:
        parse("recipe", module.PRESETS, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--preset {preset}" in text for preset in module.PRESETS)
    assert "--dry-run" in text
    parts = [f.default_factory for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING]
    fields = [field.name for part in [DataConfig, *parts] for field in dataclasses.fields(part)]
    flags = ["data" if field == "shards" else field.replace("_", "-") for field in fields]
    assert [flag for flag in flags if f"--{flag} " not in text and f"--{flag}," not in text] == []


def test_options_replace_the_values_of_a_preset(recipe):
    module = recipe("t2v_webvid")
    arguments = ["--preset", "16x64", "--data", "a.tar", "b.tar", "--out", "run", "--lr", "0.5", "--keep", "7"]
    config, dry_run = parse("recipe", module.PRESETS, module.__doc__, arguments)
    assert config == changed(module.PRESETS["16x64"](("a.tar", "b.tar"), "run"), lr=0.5, keep=7)
    assert not dry_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere-{0..3}.tar"], "nowhere-0.tar"),
        (["--data", str(RECIPES / "t2v_webvid.py")], "t2v_webvid.py is not a tar file"),
        (["--size", "30"], "size is 30"),
        (["--frames", "7"], "frames is 7"),
        (["--model", "mdm_t2v_tyny"], "mdm_t2v_tiny"),
        (["--frame-rate", "0.5", "--workers", "0"], "too short"),
        (["--out", str(RECIPES / "t2v_webvid.py" / "run")], "out: cannot write"),
        (["--micro-batch", "3"], "batch_size is 8"),
        (["--text-encoder", "./nowhere"], "text_encoder: "),
        (["--init-from", "nowhere"], "nowhere"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_2(recipe, tmp_path, capsys, options, message):
    module = recipe("t2v_webvid")
    arguments = ["--data", str(CLIPS), "--out", str(tmp_path / "run"), "--device", "cpu", *options]
    assert run_recipe(module.PRESETS, module.__doc__, arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert ": error: " in line
    assert message in line


@ALL
def test_a_dry_run_describes_the_largest_preset_without_data_or_a_run(recipe, tmp_path, capsys, name):
    module = recipe(name)
    largest = {"imagenet_256": "256", "t2i_cc12m": "1024", "t2v_webvid": "16x256"}[name]
    arguments = ["--preset", largest, "--data", "nowhere.tar", "--out", str(tmp_path / "run"), "--dry-run"]
    device = [] if name == "imagenet_256" else ["--device", "cuda"]  # else the memory of both is reckoned
    assert run_recipe(module.PRESETS, module.__doc__, [*arguments, *device]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "code"), [(4, 75), (6, 0)], ids=["stopped", "finished"])
def test_a_run_that_was_stopped_has_an_exit_code_to_be_started_again_by(recipe, tmp_path, monkeypatch, step, code):
    module = recipe("t2v_webvid")
    (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(trainer, "train", lambda config, architecture: Path(config.out))
    arguments = ["--data", str(CLIPS), "--out", str(tmp_path / "run"), "--steps", "6"]
    assert run_recipe(module.PRESETS, module.__doc__, arguments) == code
