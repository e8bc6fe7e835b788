"""What somebody gets who installs the wheel: both packages, the commands, the recipes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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


def python(site: Path, *arguments: object) -> str:
    """What Python prints that has the wheel alone of this project, elsewhere than in this tree."""
    environment = os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mdm(site: Path, *arguments: object) -> str:
    return python(site, "-m", "mdm_models.cli", *arguments)


@pytest.mark.slow
def test_both_packages_are_those_of_the_wheel(site):
    files = python(site, "-c", "import mdm_kernels, mdm_models; print(mdm_kernels.__file__, mdm_models.__file__)")
    assert files.split() == [str(site / package / "__init__.py") for package in ("mdm_kernels", "mdm_models")]
    assert (site / "mdm_kernels" / "py.typed").exists()
    assert (site / "mdm_models" / "py.typed").exists()
    assert not list(site.rglob("*.tar"))


@pytest.mark.slow
def test_a_model_in_the_wheel_is_listed_and_draws(site, tmp_path):
    assert "mdm_t2i_emoji_64" in mdm(site, "models", "--pretrained")
    prompt = "a red apple, 3d style"
    mdm(site, "sample", "mdm_t2i_emoji_64", prompt, "--steps", 1, "--device", "cpu", "--out", tmp_path / "apple.png")
    assert Image.open(tmp_path / "apple.png").size == (64, 64)


@pytest.mark.slow
def test_a_run_is_trained_and_sampled_from_the_wheel(site, tmp_path):
    small = ["--steps", 1, "--batch-size", 2, "--sample-count", 1, "--sample-steps", 1, "--workers", 0]
    run = ["--data", CLIPS, "--out", tmp_path / "run", "--device", "cpu", *small]
    assert "1 of 1 steps" in mdm(site, "train", "t2v_webvid", "--preset", "tiny", *run)
    mdm(site, "sample", tmp_path / "run", "an apple", "--steps", 1, "--device", "cpu", "--out", tmp_path / "apple.webp")
    assert (tmp_path / "apple.webp").exists()
