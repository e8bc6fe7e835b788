"""What options mean that several commands have."""

import torch

from mdm_models.commands.line import dtype_of


def test_no_dtype_is_bfloat16_on_a_gpu_and_left_to_the_pipeline_on_a_cpu():
    assert dtype_of(None, torch.device("cuda")) == torch.bfloat16
    assert dtype_of(None, torch.device("cpu")) is None
    assert dtype_of("fp32", torch.device("cuda")) == torch.float32
