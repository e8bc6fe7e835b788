"""The offline extractor on real pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.evaluation.extractors import load_extractor
from mdm_models.evaluation.frechet import FrechetDistance

DATA = Path(__file__).parents[2] / "recipes" / "data"


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, Tensor]:
    """Twice 20 different pictures (20, 3, 64, 64) uint8."""
    config = DataConfig((f"{DATA}/images-*.tar",), size=64)
    reader = SampleReader(ShardedSamples(open_shards(config)), config)
    chosen = np.random.default_rng(0).permutation(len(reader.samples))[:40]
    pictures = torch.stack([reader.read(int(index))[0].squeeze(1) for index in chosen])
    return pictures[:20], pictures[20:]


def test_other_real_pictures_are_nearer_than_noise(halves):
    real, others = halves
    noise = torch.randint(256, others.shape, dtype=torch.uint8)
    measured = FrechetDistance(load_extractor("efficientnet-lite0", 64), is_video=False, device=torch.device("cpu"))
    measured.add_real(real)
    distances = []
    for sampled in (others, noise):
        measured.add_sampled(sampled)
        distances.append(measured.compute())
    assert 0 < distances[0] < 0.5 * distances[1]
