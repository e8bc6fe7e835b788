"""Kernels run through Triton's interpreter where there is no GPU; fresh memory is poisoned with NaN, so that an
element that no kernel writes fails the test that reads it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and what they start share the cores, not fight for them

import torch

with torch.device("meta"):  # has torch list its allocating functions before a test replaces them by `poisoned_memory`
    torch.empty(0)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import hypothesis
import pytest
from torch._subclasses.fake_tensor import FakeTensor

hypothesis.settings.register_profile("CI", derandomize=True)  # the same examples in every run
if "CI" in os.environ:
    hypothesis.settings.load_profile("CI")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Floating-point tensors that torch allocates without a value are full of NaN."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            without_data = tensor.device.type == "meta" or isinstance(tensor, FakeTensor)
            if tensor.is_floating_point() and not without_data:
                with torch.no_grad():  # the tensor may be asked for as a leaf that requires a gradient
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
