"""Kernels run through Triton's interpreter where there is no GPU; fresh memory is poisoned with NaN, so that an
element that no kernel writes fails the test that reads it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and what they start share the cores, not fight for them

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import pytest


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` and `torch.empty_like` give NaN (integers: the type's smallest value)."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            bad = float("nan") if tensor.is_floating_point() else None
            return tensor.fill_(bad) if bad is not None else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
