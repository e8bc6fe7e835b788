"""Kernels run through Triton's interpreter, or on a GPU if told by --device; fresh memory is poisoned with NaN, so that
an element that no kernel writes fails the test that reads it."""

import atexit
import gc
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and what they start share the cores, not fight for them
elif not {"--device=cuda", "cuda"} & set(sys.argv):  # before the conftest of a folder of tests imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import torch

with torch.device("meta"):  # has torch list its allocating functions before a test replaces them by `poisoned_memory`
    torch.empty(0)

import hypothesis
import pytest
from torch._subclasses.fake_tensor import FakeTensor

import tests.unsynced  # noqa: F401

hypothesis.settings.register_profile("CI", derandomize=True)  # the same examples in every run
if "CI" in os.environ:
    hypothesis.settings.load_profile("CI")

KERNEL_TESTS = Path(__file__).parent / "kernels"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the kernels run: cpu (through Triton's interpreter), or cuda: tests/kernels and what needs a GPU",
    )


def pytest_configure(config):
    """Before any test module is read: Triton looks for the interpreter when it is first imported, and modules make
    tensors for their parameters."""
    if config.getoption("device") == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        from tests import interpreter  # which imports Triton

        interpreter.shorten()
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no CUDA or ROCm device on this machine")
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_default_device("cuda")


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs --device cuda"))
        return
    there = {item: KERNEL_TESTS in item.path.parents or item.get_closest_marker("gpu") is not None for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not there[item]])
    items[:] = [item for item in items if there[item]]


def pytest_collection_finish():
    """What has been imported stays: the collector of garbage need not go through it again, up to a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)
    atexit.register(gc.unfreeze)  # so that Triton finds nothing leaked


@pytest.fixture(autouse=True)
def references_by_default(request):
    """On a GPU too, ops whose test does not choose a backend run their references."""
    if request.config.getoption("device") == "cpu":
        yield
        return
    from mdm_kernels import use_backend

    with use_backend("torch"):
        yield
    torch.cuda.empty_cache()  # other processes run tests on the same GPU


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Floating-point tensors that torch allocates without a value are full of NaN."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            without_data = tensor.device.type == "meta" or isinstance(tensor, FakeTensor)
            if tensor.is_floating_point() and not without_data:
                # The tensor may be asked for as a leaf that requires a gradient.
                (tensor.detach() if tensor.requires_grad else tensor).fill_(float("nan"))
            return tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
