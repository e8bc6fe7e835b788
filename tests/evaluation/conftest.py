"""Networks that tests evaluate with, small or with random weights."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdm_models.evaluation.features import FeatureExtractor


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


class Motion(nn.Module):
    """A network of clips in 0…1 → features (N, 6): the mean colour, and its mean change from frame to frame."""

    def forward(self, clips: Tensor) -> Tensor:
        colours = clips.mean(dim=(3, 4))
        return torch.cat([colours.mean(dim=2), (colours[:, :, 1:] - colours[:, :, :-1]).mean(dim=2)], dim=1)


@pytest.fixture
def colours() -> Colours:
    return Colours()


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[[nn.Module, str], Path]:
    """scripted(module, "name.pt") saves a module as TorchScript."""
    return lambda module, name: save_scripted(module, tmp_path / name)


def save_scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but NVIDIA's file stays in it
        torch.jit.script(module).save(path)
    return path


def noise(count: int, size: int = 16, frames: int | None = None) -> Tensor:
    """Random images, or clips, uint8."""
    shape = (count, 3, size, size) if frames is None else (count, 3, frames, size, size)
    return torch.randint(256, shape, dtype=torch.uint8)


def distance(real: np.ndarray, sampled: np.ndarray) -> float:
    """The Fréchet distance of features (N, D), by its definition: Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½."""
    mean_1, mean_2 = real.mean(axis=0), sampled.mean(axis=0)
    covariance_1, covariance_2 = np.cov(real, rowvar=False), np.cov(sampled, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_1)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(0)).sum()
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
