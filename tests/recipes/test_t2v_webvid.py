"""The recipe as its users run it: processes, signals, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdm_models.commands.train import run_recipe
from mdm_models.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "t2v_webvid.py"
CLIPS = ROOT / "recipes" / "data" / "clips-000.tar"
SMALL = ["--size", "16", "--batch-size", "2", "--sample-every", "0", "--workers", "1", "--device", "cpu"]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}


def start(out: Path, *options: str, torchrun: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, str(RECIPE), "--data", str(CLIPS), "--out", str(out), *SMALL, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def terminated(tmp_path_factory) -> tuple[Path, list[Path], str]:
    """The run directory, the checkpoints and the output of two ranks that were told to stop after a step or more."""
    run = tmp_path_factory.mktemp("terminated")
    process = start(run, "--steps", "1000", "--save-every", "1000", "--log-every", "1", torchrun=2)
    wait_for(run / "log.jsonl", process)
    while not records(run):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    return run, checkpoints.list_steps(run), output


def test_terminated_ranks_save_once_and_stop(terminated):
    _, saved, output = terminated
    [path] = saved
    assert checkpoints.verified_manifest(path)
    assert "the same command goes on" in output


@pytest.fixture
def go_on(recipe):
    """Give the same command again, in this process."""
    module = recipe("t2v_webvid")

    def go_on(out: Path, *options: str) -> None:
        arguments = ["--data", str(CLIPS), "--out", str(out), *SMALL, *options]
        assert run_recipe(module.PRESETS, module.__doc__, arguments) == 0

    return go_on


def test_one_process_goes_on_with_the_run_of_two(terminated, go_on, capsys):
    run, *_ = terminated
    steps = records(run)[-1]["step"] + 2
    go_on(run, "--steps", str(steps), "--log-every", "1")
    assert [record["samples_seen"] for record in records(run)] == [2 * step for step in range(1, steps + 1)]
    assert f"{steps} of {steps} steps" in capsys.readouterr().out


def test_after_kill_9_the_same_command_goes_on(tmp_path, go_on):
    options = ("--steps", "6", "--save-every", "2", "--log-every", "1")
    process = start(tmp_path, *options)
    wait_for(tmp_path / "checkpoints" / "step-00000002", process)
    process.kill()
    process.wait(60)  # not for those that decode, which find out some seconds later
    go_on(tmp_path, *options)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 7))
    assert (tmp_path / "model" / "pipeline.json").exists()
