"""The recipe as its users run it: processes, signals, torchrun, command lines."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdm_models.config import UNetConfig
from mdm_models.training import checkpoint as checkpoints
from mdm_models.training.config import TrainConfig, plan
from mdm_models.training.data import Batch
from mdm_models.training.distributed import Place
from mdm_models.training.learner import Learner

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "t2v_webvid.py"
CLIPS = ROOT / "recipes" / "data" / "clips-000.tar"
SMALL = ["--size", "16", "--batch-size", "2", "--sample-every", "0", "--workers", "1", "--device", "cpu"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))
    import t2v_webvid

    yield t2v_webvid
    sys.path.remove(str(RECIPE.parent))


def start(out: Path, *options: str, torchrun: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, str(RECIPE), "--data", str(CLIPS), "--out", str(out), *SMALL, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def narrow(config: UNetConfig) -> UNetConfig:
    """The same architecture at an eighth of the width, at least 32: GroupNorm has 32 groups."""
    return dataclasses.replace(
        config,
        channels=tuple(max(32, width // 8) for width in config.channels),
        embed_dim=128,
        context_dim=min(64, config.context_dim),
        context_proj_dim=min(64, config.context_proj_dim),
        inner=narrow(config.inner) if config.inner else None,
    )


@pytest.mark.parametrize(
    ("name", "model", "frames", "size", "global_batch", "steps"),
    [
        ("64", "mdm_t2i_64", 1, 64, 2048, 500_000),
        ("16x64", "mdm_t2v_64", 16, 64, 512, 500_000),
        ("16x256", "mdm_t2v_256", 16, 256, 128, 300_000),
    ],
)
def test_the_full_size_presets_are_the_papers(recipe, name, model, frames, size, global_batch, steps):
    config = recipe.PRESETS[name](data=("clips.tar",), out="run")
    assert (config.model, config.frames, config.size, config.steps) == (model, frames, size, steps)
    assert config.batch_size * recipe.GPUS == global_batch
    assert (config.lr, config.warmup, config.beta1, config.beta2, config.eps) == (1e-4, 30_000, 0.9, 0.99, 1e-8)
    assert (config.clip, config.ema_decay, config.caption_dropout) == (2.0, 0.9999, 0.1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("64", 64), ("16x64", 64), ("16x256", 64), pytest.param("16x256", 256, marks=pytest.mark.slow)],
)
def test_one_step_of_a_full_size_preset_with_its_widths_scaled_down(recipe, name, size):
    config = recipe.PRESETS[name](data=("clips.tar",), out="run")
    config = dataclasses.replace(config, size=size, text_width=64, text_layers=1, batch_size=1, warmup=0)
    learner = Learner(config, narrow(plan(config).architecture), Place(0, 1, torch.device("cpu")))
    before = learner.model.unet.conv_out.weight.detach().clone()
    shape = (1, 3, config.frames, config.size, config.size)
    assert learner.learn(Batch(torch.randint(256, shape, dtype=torch.uint8), ["a cat"], [])).finite
    assert not torch.equal(learner.model.unet.conv_out.weight, before)
    unused = [name for name, parameter in learner.model.named_parameters() if parameter.grad is None]
    assert unused == []  # DistributedDataParallel would wait for them


def test_options_replace_the_values_of_a_preset(recipe):
    config = recipe.parse(
        ["--preset", "16x64", "--data", "a.tar", "b.tar", "--out", "run", "--lr", "0.5", "--keep", "7"]
    )
    preset = recipe.PRESETS["16x64"](data=("a.tar", "b.tar"), out="run")
    assert config == dataclasses.replace(preset, lr=0.5, keep=7)


def test_help_explains_presets_and_options(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--preset {name}" in text for name in recipe.PRESETS)
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    "arguments", [["--preset", "huge"], ["--data", "a.tar"], ["--data", "a", "--out", "b", "--lr", "x"]]
)
def test_a_wrong_command_line_ends_with_code_2(recipe, arguments):
    with pytest.raises(SystemExit) as end:
        recipe.parse(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere-{0..3}.tar"], "nowhere-0.tar"),
        (["--data", str(RECIPE)], "t2v_webvid.py is not an"),
        (["--data", str(CLIPS), "--size", "30"], "size is 30"),
        (["--data", str(CLIPS), "--frames", "7"], "frames is 7"),
        (["--data", str(CLIPS), "--model", "mdm_t2v_tyny"], "mdm_t2v_tiny"),
        (["--data", str(CLIPS), "--frame-rate", "0.5", "--workers", "0"], "too short"),
        (["--data", str(CLIPS), "--out", str(RECIPE / "run")], "out: cannot write"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_2(recipe, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["t2v_webvid.py", "--out", str(tmp_path / "run"), *options])
    assert recipe.main() == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert line.startswith("error: ")
    assert message in line


def test_two_ranks_train_as_one_and_one_process_goes_on(recipe, tmp_path, monkeypatch, capsys):
    finish(start(tmp_path, "--steps", "4", "--log-every", "2", torchrun=2))
    assert [record["samples_seen"] for record in records(tmp_path)] == [8, 16]
    arguments = ["--data", str(CLIPS), "--out", str(tmp_path), *SMALL, "--steps", "6", "--log-every", "2"]
    monkeypatch.setattr(sys, "argv", ["t2v_webvid.py", *arguments])
    assert recipe.main() == 0
    assert [record["samples_seen"] for record in records(tmp_path)] == [8, 16, 20]
    assert "6 of 6 steps" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--steps", "12", "--save-every", "4", "--log-every", "1")
    process, undisturbed = start(killed, *options), start(whole, *options)
    wait_for(killed / "checkpoints" / "step-00000004", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finish(start(killed, *options))
    finish(undisturbed)
    assert [record["step"] for record in records(killed)] == list(range(1, 13))
    ours, theirs = checkpoints.load_averages(killed), checkpoints.load_averages(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_terminated_ranks_save_once_and_stop(tmp_path):
    process = start(tmp_path, "--steps", "1000", "--save-every", "1000", "--log-every", "1", torchrun=2)
    wait_for(tmp_path / "log.jsonl", process)
    while not records(tmp_path):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    [path] = checkpoints.list_steps(tmp_path)
    assert checkpoints.verified_manifest(path)
    assert "the same command goes on" in output
