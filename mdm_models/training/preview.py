"""The same few captions, sampled again and again as the model learns, beside the real clips."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdm_models.diffusion import sample
from mdm_models.training.data import ATTEMPTS, ClipReader, Skip, to_unit_range
from mdm_models.training.grid import save_grid
from mdm_models.training.learner import Learner


@dataclass(frozen=True)
class Preview:
    """Captions and their real clips (N, 3, T, size, size) in −1…1."""

    clips: Tensor
    captions: list[str]

    @classmethod
    def first_of(cls, reader: ClipReader, indices: Iterable[int], count: int) -> "Preview | None":
        """The first `count` usable samples among the numbers `indices`, of which at most ATTEMPTS are tried; None if
        there is none."""
        tried = (reader.try_read(int(index)) for index in itertools.islice(indices, ATTEMPTS))
        found = list(itertools.islice((clip for clip in tried if not isinstance(clip, Skip)), count))
        if not found:
            return None
        return cls(torch.stack([to_unit_range(clip) for clip, _ in found]), [caption for _, caption in found])

    def draw(self, learner: Learner, shapes: list[tuple[int, ...]], path: Path) -> None:
        """Sample a clip for every caption with the averaged weights and write the animated grid.

        shapes: one sample's shape at every level. Always from the same noise, so that grids can be compared.
        """
        model, config, device = learner.model, learner.config, learner.place.device
        tokens = model.text.tokenize(self.captions + [""] * len(self.captions)).to(device)
        model.eval()
        with learner.ema.swapped_in(), torch.no_grad(), learner.autocast():
            context, mask = model.text(tokens)
            (captioned, empty), (captioned_mask, empty_mask) = context.chunk(2), mask.chunk(2)
            sampled = sample(
                model.unet,
                learner.diffusion,
                [(len(self.captions), *shape) for shape in shapes],
                captioned,
                captioned_mask,
                negative_context=empty,
                negative_context_mask=empty_mask,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.sample_steps,
                generator=torch.Generator().manual_seed(config.seed),
            )
        model.train()
        sampled = sampled if sampled.dim() == 5 else sampled.unsqueeze(2)
        path.parent.mkdir(exist_ok=True)
        save_grid(path, {"real": self.clips, "sampled": sampled}, self.captions, config.frame_rate)
