"""What options mean that several commands have."""

import pytest
import torch

from mdm_models.commands.line import device_of, dtype_of


def test_no_dtype_is_bfloat16_on_a_gpu_and_left_to_the_pipeline_on_a_cpu():
    assert dtype_of(None, torch.device("cuda")) == torch.bfloat16
    assert dtype_of(None, torch.device("cpu")) is None
    assert dtype_of("fp32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("error", [RuntimeError("Found no NVIDIA driver"), AssertionError("not built with CUDA")])
def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch, error):
    def empty(*size, device):
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=f"--device cuda: {error}"):
        device_of("cuda")


def test_a_device_of_no_kind_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--device gpu: Expected one of cpu, cuda"):
        device_of("gpu")
