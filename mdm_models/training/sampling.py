"""Sampling from the model as it is while it learns, with its averaged weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mdm_models.diffusion import sample
from mdm_models.diffusion.noise import Generators
from mdm_models.training.learner import Learner


@contextlib.contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Inside the block the model is in evaluation mode, without gradients, and has its averaged weights; every process
    must enter it."""
    learner.model.eval()
    try:
        with learner.ema.swapped_in(), torch.no_grad():
            yield
    finally:
        learner.model.train()


def draw(learner: Learner, prompts: list[str], generator: Generators) -> Tensor:
    """One image (B, C, H, W) or clip (B, C, T, H, W) in −1…1 for each prompt, by the run's sampling settings.

    prompts: as the run's text encoder reads them; generator: as for `sample`. To be called inside `averaged`, by every
    process equally often: with FSDP each of them holds a part of the weights.
    """
    output = learner.config.output
    shapes = learner.architecture.sample_shapes(learner.config.data.size)
    with learner.autocast():
        features, mask = learner.text_features(prompts + [""] * len(prompts))  # together, so that they are equally long
        (captioned, empty), (captioned_mask, empty_mask) = features.chunk(2), mask.chunk(2)
        return sample(
            learner.model.unet,
            learner.diffusion,
            [(len(prompts), *shape) for shape in shapes],
            captioned,
            captioned_mask,
            negative_context=empty,
            negative_context_mask=empty_mask,
            guidance_scale=output.guidance_scale,
            num_inference_steps=output.sample_steps,
            sampler=output.sampler,
            generator=generator,
        )
