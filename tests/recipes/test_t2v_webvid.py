"""The recipe as its users run it: processes, signals, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mdm_models.training import checkpoint as checkpoints
from mdm_models.training.command import main

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


def test_two_ranks_train_and_one_process_goes_on(recipe, tmp_path, capsys):
    finish(start(tmp_path, "--steps", "4", "--log-every", "2", torchrun=2))
    assert [record["samples_seen"] for record in records(tmp_path)] == [4, 8]
    module = recipe("t2v_webvid")
    arguments = ["--data", str(CLIPS), "--out", str(tmp_path), *SMALL, "--steps", "6", "--log-every", "2"]
    assert main(module.PRESETS, module.__doc__, arguments) == 0
    assert [record["samples_seen"] for record in records(tmp_path)] == [4, 8, 12]
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
