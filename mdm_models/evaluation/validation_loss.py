"""The training loss of each level on given samples, at times and noise that depend on a sample's number alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_models.diffusion.noise import draw_noise, seeded_generators
from mdm_models.diffusion.times import continuous_times
from mdm_models.pipeline import Pipeline

GOLDEN_RATIO = 0.6180339887498949


def fixed_times(numbers: Sequence[int], num_steps: int) -> Tensor:
    """Map B sample numbers to times (B,) float32 in 0…num_steps−1. Successive numbers spread evenly however many there
    are (multiples of the golden ratio modulo 1), so that few samples already see all noise levels."""
    fractions = (torch.tensor(numbers, dtype=torch.float64) + 0.5) * GOLDEN_RATIO % 1
    return continuous_times(fractions, num_steps).float()


@torch.no_grad()
def level_losses(
    pipeline: Pipeline, images: Tensor, prompts: list[str], numbers: Sequence[int], seed: int
) -> Tensor:
    """Give each level's mean squared error, unweighted, in the space of `loss_target` → (levels, B) float32.

    images (B, C, [T,] H, W) in −1…1; numbers: B sample numbers, which with the seed determine noise and times.
    """
    diffusion, generators = pipeline.diffusion, seeded_generators(seed, numbers)
    noise = [draw_noise((len(numbers), *shape), generators, images.device) for shape in pipeline.shapes]
    time = fixed_times(numbers, diffusion.num_steps).to(images.device)
    text = () if pipeline.text_encoder is None else pipeline.text_encoder(prompts)
    preds = pipeline.model(diffusion.add_noise(images, time, pipeline.model.config.strides, noise), time, *text)
    return diffusion.per_sample_loss(preds, images, time, noise, per_level=True)
