"""The recipe as its users run it: processes, signals, torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_after_kill_9_the_same_command_goes_on(tmp_path):
    options = ("--steps", "8", "--save-every", "3", "--log-every", "1")
    process = start(tmp_path, *options)
    wait_for(tmp_path / "checkpoints" / "step-00000003", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finish(start(tmp_path, *options))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    assert (tmp_path / "model" / "pipeline.json").exists()


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
