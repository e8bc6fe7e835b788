"""The noise that a seed stands for: normal, independent, and the same wherever a sample is drawn."""

import pytest
import torch
from torch import Tensor

from mdm_kernels import backend
from mdm_kernels.multires import multires_noise


def pure_noise(shape, strides, seed, memory_format=torch.contiguous_format) -> list[Tensor]:
    """What a seed stands for, as multires_noise shows it at ᾱ = 0."""
    images = torch.zeros(shape).contiguous(memory_format=memory_format)
    return multires_noise(images, torch.zeros(len(strides), shape[0]), strides, seed=seed)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_seeded_noise_depends_on_neither_batch_nor_format_nor_other_levels(name):
    with backend.use_backend(name):
        first, second = pure_noise((3, 3, 16, 16), [1, 4], 11)
        (other_level,) = pure_noise((2, 3, 16, 16), [4], 11, torch.channels_last)
    assert torch.equal(second[:2], other_level)
    assert not torch.equal(first[:, :, :4, :4], second)


def test_seeded_noise_differs_by_sample_channel_level_and_every_part_of_the_seed():
    blocks = []
    for seed in (0, 1, 2**32, 2**62):
        for level in pure_noise((2, 2, 2, 8, 8), [1, (2, 1)], seed):
            blocks += [level[b, c, 0] for b in range(2) for c in range(2)]
    rows = torch.stack(blocks).reshape(-1, 8)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_seeded_noise_is_standard_normal_and_independent():
    (noise,) = pure_noise((4, 3, 128, 128), [1], 5)
    n = noise.numel()
    assert noise.mean().abs() < 4 / n**0.5
    assert (noise.var() - 1).abs() < 4 * (2 / n) ** 0.5
    ranked = torch.special.ndtr(noise.flatten().sort().values)
    assert (ranked - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / n**0.5  # Kolmogorov–Smirnov, p = 0.001
    flat = noise.flatten()
    for lag in (1, 2, 3, 128, 128 * 128, 3 * 128 * 128):
        assert (flat[lag:] * flat[:-lag]).mean().abs() < 4.5 / n**0.5, f"correlation at {lag}"
