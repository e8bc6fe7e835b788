"""Noise for sampling, reproducible sample by sample."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def seeded_generators(seed: int, samples: Iterable[int]) -> list[torch.Generator]:
    """One generator for each sample's number: what a sample is drawn from depends on the seed and its number alone.

    They draw on the CPU, so that every device gets the same noise. Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    states = [np.random.SeedSequence((seed, sample)).generate_state(1).item() for sample in samples]
    return [torch.Generator().manual_seed(state) for state in states]


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal noise in float32, drawn where the generator lies; a list of generators draws one sample each."""
    if generator is None:
        return torch.randn(*shape, dtype=torch.float32, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator has {len(generator)} entries; the batch has {shape[0]} samples")
    return torch.stack([draw_noise(shape[1:], one, device) for one in generator])
