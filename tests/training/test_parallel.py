"""Two processes, by DDP and by FSDP2, against one."""

from pathlib import Path

import pytest
import torch

from mdm_models import Pipeline
from mdm_models.processes import Processes
from tests import forked
from tests.training import ranks

PARALLEL = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes left: ddp-float32.pt, fsdp-float32.pt, fsdp-bf16.pt and the models that they exported."""
    folder = tmp_path_factory.mktemp("ranks")
    assert forked.run_together(ranks.main, *((folder, environment) for environment in forked.world(2))) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return ranks.learn(Processes(0, 1, torch.device("cpu")), tmp_path_factory.mktemp("alone"), "ddp")


@PARALLEL
def test_two_processes_have_the_gradients_of_one_with_the_double_batch(folder, alone, parallel):
    found = torch.load(folder / f"{parallel}-float32.pt")["gradients"]
    assert found.keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@PARALLEL
def test_two_processes_measure_and_learn_what_one_does(folder, alone, parallel):
    found = torch.load(folder / f"{parallel}-float32.pt")
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-4, atol=0)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-4)  # a tenth of the learning rate


@PARALLEL
def test_two_processes_sample_what_one_does(folder, alone, parallel):
    found = torch.load(folder / f"{parallel}-float32.pt")["sampled"]
    torch.testing.assert_close(found, alone["sampled"], rtol=0, atol=1e-3)


def test_with_fsdp_a_process_holds_half_of_the_weights(folder, alone):
    held = torch.load(folder / "fsdp-float32.pt")["local"]
    assert 0.5 * alone["local"] <= held < 0.51 * alone["local"]  # rounded up, tensor by tensor


def test_with_fsdp_weights_are_gathered_in_the_dtype_that_is_computed_in(folder):
    """And kept in float32, in which gradients are added up."""
    found = {name: torch.load(folder / f"fsdp-{name}.pt") for name in ("float32", "bf16")}
    assert [each["computed in"] for each in found.values()] == [["torch.float32"], ["torch.bfloat16"]]
    assert {weight.dtype for weight in found["bf16"]["weights"].values()} == {torch.float32}
    losses, rounded = (each["losses"] for each in found.values())
    torch.testing.assert_close(rounded, losses, rtol=0.02, atol=0)
    assert not torch.equal(rounded, losses)


@PARALLEL
def test_what_processes_export_is_whole(folder, parallel):
    pipeline = Pipeline.from_pretrained(folder / f"{parallel}-float32-model")
    (picture,) = pipeline("a cat", num_inference_steps=1, progress=False)
    assert picture.size == (16, 16)
