"""A small model as the official code saves it."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mdm_models import zoo
from tests.models.golden import GoldenModel, read


@dataclass
class OfficialCheckpoint:
    """A .pth file of a golden model, known to the zoo as `name`."""

    path: Path
    name: str
    golden: GoldenModel


@pytest.fixture
def official_checkpoint(tmp_path, monkeypatch) -> OfficialCheckpoint:
    golden = GoldenModel("unet_masked_lm_head")
    monkeypatch.setitem(zoo._CONFIGS, "mdm_golden", lambda: golden.config)
    _, tensors = read("unet_masked_lm_head")
    weights = {key[len("param.") :]: tensor.float() for key, tensor in tensors.items() if key.startswith("param.")}
    path = tmp_path / "vis_model.pth"
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1e-4), "batch_num": 7}, path)
    return OfficialCheckpoint(path, "mdm_golden", golden)
