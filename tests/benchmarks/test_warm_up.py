"""The warm-up learns what would be launched, and compiles it; without a GPU for a target that is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import warm_up

REPOSITORY = Path(__file__).parents[2]


def test_a_models_training_step_is_learnt_with_its_backward():
    names = {launch.name for launch in warm_up.launches("none", ["mdm_t2i_tiny"])}
    assert {"noise_level", "loss_level", "residual_gradient", "affine_gradients", "film_gradients"} <= names
    assert {"self_cross_forward", "self_cross_query_gradient", "self_cross_key_gradient"} <= names
    assert {"held_group_forward", "held_group_backward"} <= names


def test_models_see_channels_last_as_on_a_gpu():
    """Of maps, not of the 1×1 ones at which both formats are one."""
    formats = {
        launch.arguments["CHANNELS_LAST"]
        for launch in warm_up.launches("none", ["mdm_t2i_tiny"])
        if launch.name == "held_group_forward" and launch.arguments["x_ptr"].dim() == 4
    }
    assert formats == {True}


def test_every_case_of_the_benchmark_is_learnt():
    names = {launch.name for launch in warm_up.launches("quick", [])}
    assert {"tile_statistics", "apply_backward", "flash_forward", "flash_key_gradient", "temporal_backward"} <= names


def test_cases_are_learnt_in_the_dtype_that_is_named():
    launches = warm_up.launches("quick", [], torch.float32)
    (forward,) = {launch.arguments["q_ptr"].dtype for launch in launches if launch.name == "flash_forward"}
    assert forward == torch.float32


def test_experiments_are_learnt_beside_what_they_would_replace():
    launches = warm_up.launches("experiments", [])
    names = {launch.name for launch in launches}
    assert {"tile_statistics", "apply_backward", "one_pass_forward", "one_pass_backward"} <= names
    assert {launch.by_tma for launch in launches if launch.name == "flash_forward"} == {False, True}


def test_what_is_learnt_is_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = "--cases none --models mdm_t2i_tiny --target sm_90 --processes 1 --most 1"
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.warm_up", *command.split()], env=environment, cwd=REPOSITORY,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "1 compiled for sm_90" in process.stdout
    assert "0 failed" in process.stdout


def test_an_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        warm_up.main(["--target", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
