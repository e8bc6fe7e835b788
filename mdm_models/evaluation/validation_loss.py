"""The training loss of each level on given samples, at times and noise that depend on a sample's number alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdm_kernels.multires import multires_loss
from mdm_models.config import UNetConfig
from mdm_models.diffusion import MatryoshkaDiffusion
from mdm_models.diffusion.noise import draw_noise, seeded_generators
from mdm_models.diffusion.times import continuous_times

GOLDEN_RATIO = 0.6180339887498949


def fixed_times(numbers: Sequence[int], num_steps: int) -> Tensor:
    """Sample numbers → times (B,) float32 in 0…num_steps−1. Successive numbers spread evenly however many there are
    (multiples of the golden ratio modulo 1), so that few samples already see all noise levels."""
    fractions = (torch.tensor(numbers, dtype=torch.float64) + 0.5) * GOLDEN_RATIO % 1
    return continuous_times(fractions, num_steps).float()


def level_losses(
    model: Callable[[list[Tensor], Tensor], list[Tensor]],
    diffusion: MatryoshkaDiffusion,
    images: Tensor,
    architecture: UNetConfig,
    numbers: Sequence[int],
    seed: int,
) -> Tensor:
    """Mean squared error of each level, unweighted, in the space of `diffusion.loss_target` → (levels, B) float32.

    model: (x_t of every level, time (B,)) → predictions; images (B, C, [T,] H, W) in −1…1; architecture: the model's;
    numbers: B sample numbers, which with the seed determine noise and times.
    """
    generators = seeded_generators(seed, numbers)
    shapes, strides = architecture.sample_shapes(images.shape[-1]), architecture.strides
    noise = [draw_noise((len(numbers), *shape), generators, images.device) for shape in shapes]
    time = fixed_times(numbers, diffusion.num_steps).to(images.device)
    preds = model(diffusion.add_noise(images, time, strides, noise), time)
    alpha_bars = diffusion.training_alpha_bars(time)
    spaces = {"prediction": diffusion.prediction, "loss_target": diffusion.loss_target}
    losses = [
        multires_loss([pred], images, alpha_bar[None], [stride], [eps], **spaces)
        for pred, alpha_bar, stride, eps in zip(preds, alpha_bars, strides, noise, strict=True)
    ]
    return torch.stack(losses)
