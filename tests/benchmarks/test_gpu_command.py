"""`make gpu`, as far as a machine without a GPU can show it: a stand-in for Python notes what it is asked to run."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks/gpu.sh"
HAS_GPU = any(Path(f"/dev/{name}").exists() for name in ("nvidia0", "kfd", "dxg"))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_nothing_is_installed_or_run(tmp_path):
    make = ["make", "--directory", str(REPOSITORY), "gpu", f"BIN={tmp_path}/bin"]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of make -j test
    process = subprocess.run(make, env=environment, capture_output=True, text=True, check=False)
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


PARTS = ("tests", "kernels", "models", "memory", "experiments")


def run(folder: Path, part: str, failing: str = "nothing that fails") -> tuple[subprocess.CompletedProcess, list[str]]:
    """A part with the stand-in, and with stand-ins for NVIDIA's tools; → also what the stand-in was asked to run."""
    for tool in ("compute-sanitizer", "ncu", "nvidia-smi"):
        (folder / tool).write_text("#!/bin/sh\nfor last; do :; done\n")
        (folder / tool).chmod(0o755)
    places = {"OUT": str(folder / "out"), "PATH": f"{folder}:{os.environ['PATH']}", "REFERENCE": "ml-mdm"}
    environment = os.environ | places
    command = [SCRIPT, part, stand_in(folder, failing)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return process, (folder / "calls.txt").read_text().splitlines()


def test_each_part_runs_what_it_says(tmp_path):
    ran = {}
    for part in PARTS:
        folder = tmp_path / part
        folder.mkdir()
        process, calls = run(folder, part)
        assert process.returncode == 0, process.stderr
        ran[part] = " ".join(calls) + process.stdout
    assert "benchmarks.warm_up" in ran["tests"]
    assert "tests/kernels/test_on_gpu.py" in ran["tests"]
    assert "test_beyond_int32.py" not in ran["tests"]
    assert f"kernels.py --quick --plot --out {tmp_path}/kernels/out" in ran["kernels"]
    assert "--dtype fp32 --filter attention" in ran["kernels"]
    assert "benchmarks.graphs --models mdm_t2i_64,mdm_t2i_256,mdm_t2i_1024" in ran["models"]
    assert "throughput.py --cuda-graphs --models mdm_t2i_256 --batch 16" in ran["models"]
    assert "--reference ml-mdm --backward --cuda-graphs --batch 8 --seconds 0.5 --models mdm_t2i_256" in ran["models"]
    assert "test_beyond_int32.py" in ran["models"]
    assert f"kernels.py --experiments --out {tmp_path}/experiments/out/experiments" in ran["experiments"]
    assert "-x -k by_tma tests/kernels/test_on_gpu.py tests/kernels/test_out_of_bounds.py" in ran["experiments"]
    assert "and not by_tma" in ran["tests"]
    assert "-m not slow -k one_pass" in ran["experiments"]  # by default pytest leaves out what is marked gpu
    assert all(f"--tool {tool}" in ran["memory"] for tool in ("memcheck", "racecheck"))


def test_the_warm_up_takes_all_cores_but_two(tmp_path):
    (tmp_path / "nproc").write_text("#!/bin/sh\necho ${OMP_NUM_THREADS:-16}\n")
    (tmp_path / "nproc").chmod(0o755)
    _, calls = run(tmp_path, "tests")
    assert any("benchmarks.warm_up --processes 14" in call for call in calls)


def test_the_files_of_tests_that_a_part_names_exist(tmp_path):
    for part in PARTS:
        folder = tmp_path / part
        folder.mkdir()
        _, calls = run(folder, part)
        files = [word for call in calls for word in call.split() if word.startswith("tests/")]
        assert all((REPOSITORY / file).is_file() for file in files), files


def test_a_part_leaves_at_most_eight_files(tmp_path):
    """As many as a machine lent for a while sends back. What Python itself writes is counted from its options."""
    for part in PARTS:
        folder = tmp_path / part
        folder.mkdir()
        _, calls = run(folder, part)
        written = len(list((folder / "out").iterdir()))
        written += sum(call.count("--json ") * 2 + call.count("--junitxml") for call in calls)
        written += sum(("kernels.py" in call) * (5 if "--plot" in call else 2) for call in calls)
        assert written <= 8, part


def test_what_fails_is_named_and_the_rest_runs(tmp_path):
    process, calls = run(tmp_path, "kernels", failing="--plot")
    assert process.returncode == 1
    assert process.stderr.startswith(f"failed: {tmp_path}/python benchmarks/kernels.py --quick --plot")
    assert "--dtype fp32" in calls[-1]


def test_a_torch_that_sees_no_gpu_is_named(tmp_path):
    process, calls = run(tmp_path, "tests", failing="cuda.is_available")
    assert process.returncode == 1
    assert process.stderr == f"make gpu: the torch of {tmp_path}/python sees no GPU; nothing was run\n"
    assert len(calls) == 1


def test_an_unknown_part_is_named(tmp_path):
    process, _ = run(tmp_path, "everything")
    assert process.returncode == 2
    assert process.stderr == f"benchmarks/gpu.sh: no part everything; there are {', '.join(PARTS)}\n"


def test_benchmarks_need_no_package_that_a_plain_torch_image_lacks():
    """An image with torch, triton, pytest and a few more has no tyro, webdataset, av, open_clip or diffusers."""
    code = """if True:
        import sys
        for name in ("tyro", "webdataset", "av", "open_clip", "diffusers", "tensorboard", "matplotlib"):
            sys.modules[name] = None
        from benchmarks import figures, graphs, kernels, throughput, warm_up
        from tests.kernels import calls, zoo_calls
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_rehearsed_without_a_gpu(part, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [SCRIPT, part, sys.executable], env=environment | {"REHEARSE": "1", "OUT": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
