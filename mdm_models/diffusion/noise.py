"""Noise for sampling, reproducible sample by sample."""

import contextlib
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def seeded_generators(seed: int, samples: Iterable[int]) -> list[torch.Generator]:
    """Make one generator for each sample's number: what a sample is drawn from depends on the seed and its number
    alone.

    They draw on the CPU, so that every device gets the same noise. Raises ValueError for a negative seed, TypeError for
    one that is no integer.
    """
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed is {seed!r}; it must be an integer")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    states = [np.random.SeedSequence((seed, sample)).generate_state(1).item() for sample in samples]
    return [torch.Generator().manual_seed(state) for state in states]


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Draw standard normal noise in float32, where the generator lies; a list of generators draws one sample each."""
    if generator is None:
        return torch.randn(*shape, dtype=torch.float32, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=generator.device).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator has {len(generator)} entries; the batch has {shape[0]} samples")
    return torch.stack([draw_noise(shape[1:], one, one.device) for one in generator]).to(device)


@contextlib.contextmanager
def noise_for(
    shapes: Sequence[Sequence[int]], generator: Generators, device: torch.device, count: int
) -> Iterator[Callable[[], list[Tensor]]]:
    """Give a function to be called at most `count` times in a `with` block: it draws standard normal noise of these
    shapes as `draw_noise` does.

    Where a CPU draws for a GPU, a thread draws what the next call returns while the GPU works; the generator is not
    asked for more than `count` draws.
    """
    if not _drawn_elsewhere(generator, device):
        yield lambda: [draw_noise(shape, generator, device) for shape in shapes]
        return

    def draw() -> list[Tensor]:
        drawn = [draw_noise(shape, generator, torch.device("cpu")) for shape in shapes]
        return [x.pin_memory() for x in drawn] if device.type == "cuda" else drawn

    with ThreadPoolExecutor(1) as pool:
        draws = (pool.submit(draw) for _ in range(count))  # submitted as they are asked for
        ahead = deque(islice(draws, 1))

        def noise() -> list[Tensor]:
            drawn = ahead.popleft()
            ahead.extend(islice(draws, 1))
            return [x.to(device, non_blocking=True) for x in drawn.result()]

        yield noise


def _drawn_elsewhere(generator: Generators, device: torch.device) -> bool:
    """Whether a CPU draws for another device."""
    generators = [generator] if isinstance(generator, torch.Generator) else generator or []
    return device.type != "cpu" and {one.device.type for one in generators} == {"cpu"}
