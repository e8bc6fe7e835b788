"""What somebody gets who installs the wheel: both packages, the commands, the recipes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "recipes" / "data" / "clips-000.tar"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel of a copy of this tree is installed."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for name in ("mdm_kernels", "mdm_models", "recipes"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tree / "dist", tree], check=True)
    [wheel] = (tree / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def mdm(site: Path, *arguments: object) -> str:
    """What a command prints that is run from the wheel, elsewhere than in this tree."""
    command = [sys.executable, "-m", "mdm_models.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_both_packages_are_those_of_the_wheel(site):
    assert mdm(site, "--version").startswith("mdm ")
    assert (site / "mdm_kernels" / "py.typed").exists()
    assert (site / "mdm_models" / "py.typed").exists()
    assert not list(site.rglob("*.tar"))


@pytest.mark.slow
def test_a_run_is_trained_and_sampled_from_the_wheel(site, tmp_path):
    small = ["--steps", 1, "--batch-size", 2, "--sample-count", 1, "--sample-steps", 1, "--workers", 0]
    run = ["--data", CLIPS, "--out", tmp_path / "run", "--device", "cpu", *small]
    assert "1 of 1 steps" in mdm(site, "train", "t2v_webvid", "--preset", "tiny", *run)
    mdm(site, "sample", tmp_path / "run", "an apple", "--steps", 1, "--device", "cpu", "--out", tmp_path / "apple.webp")
    assert (tmp_path / "apple.webp").exists()
