"""`make gpu`, as far as a machine without a GPU can show it: a stand-in for Python notes what it is asked to run."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks/gpu.sh"
HAS_GPU = any(Path(f"/dev/{name}").exists() for name in ("nvidia0", "kfd", "dxg"))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_installed_or_run(tmp_path):
    make = ["make", "--directory", str(REPOSITORY), "gpu", f"BIN={tmp_path}/bin"]
    process = subprocess.run(make, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert process.stderr.startswith("make gpu: this machine has no GPU")
    check = subprocess.run([SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert (check.returncode, check.stdout, check.stderr.count("\n")) == (1, "", 1)


def stand_in(folder: Path, failing: str) -> Path:
    """A `python` that appends its arguments to calls.txt and fails if they contain the text."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls.txt\ncase "$*" in *"{failing}"*) exit 1;; esac\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def run(folder: Path, failing: str, *options: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    command = [SCRIPT, stand_in(folder, failing), *options]
    environment = os.environ | {"RESULTS": str(folder / "out")}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return process, (folder / "calls.txt").read_text().splitlines()[1:]


def test_tests_come_first_and_then_the_benchmarks(tmp_path):
    process, calls = run(tmp_path, "nothing that fails", "--quick")
    assert process.returncode == 0, process.stderr
    assert calls == [
        "-m pytest -q tests/kernels --device cuda -m not slow -n 4 --dist loadgroup",
        f"benchmarks/kernels.py --out {tmp_path}/out --quick",
        f"benchmarks/throughput.py --json {tmp_path}/out/throughput.json",
    ]


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path):
    process, calls = run(tmp_path, "--device cuda")
    assert process.returncode == 1
    tests = "pytest -q tests/kernels --device cuda -m not slow -n 4 --dist loadgroup"
    assert process.stderr == f"failed: {tmp_path}/python -m {tests}\n"
    assert len(calls) == 3


def test_a_torch_that_sees_no_gpu_is_named(tmp_path):
    process, calls = run(tmp_path, "cuda.is_available")
    assert process.returncode == 1
    assert process.stderr == f"make gpu: the torch of {tmp_path}/python sees no GPU; nothing was run\n"
    assert calls == []
