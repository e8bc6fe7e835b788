import pytest
import torch

from mdm_models.errors import TrainingError
from mdm_models.processes import init_process_group


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="there is no GPU here"), init_process_group("cuda"):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(TrainingError, match="4 processes on this machine and 2 GPUs"), init_process_group("auto"):
        pass
