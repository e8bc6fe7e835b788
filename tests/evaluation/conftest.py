"""Networks that tests evaluate with, small or with random weights."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdm_models.evaluation.extractors import FeatureExtractor


class Colours(FeatureExtractor):
    """The mean colour of an image: three features that can be computed by hand."""

    def __init__(self):
        super().__init__("colours", nn.Identity(), num_features=3)

    def features(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


class MeanColour(nn.Module):
    """A network that somebody saved: images in 0…1 → features (N, 3)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture
def colours() -> Colours:
    return Colours()


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[[nn.Module, str], Path]:
    """scripted(module, "name.pt") saves a module as TorchScript."""

    def save(module: nn.Module, name: str) -> Path:
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but NVIDIA's file stays in it
            torch.jit.script(module).save(path)
        return path

    return save


def noise(count: int, size: int = 16, frames: int | None = None) -> Tensor:
    """Random images, or clips, uint8."""
    shape = (count, 3, size, size) if frames is None else (count, 3, frames, size, size)
    return torch.randint(256, shape, dtype=torch.uint8)
