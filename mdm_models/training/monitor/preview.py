"""The same few captions, sampled again and again as the model learns, beside the real clips."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mdm_models.data.reader import SampleReader, Skip
from mdm_models.data.stream import ATTEMPTS, to_unit_range
from mdm_models.processes import Processes
from mdm_models.training.config import OutputConfig
from mdm_models.training.learner import Learner
from mdm_models.training.monitor.grid import save_grid


@dataclass(frozen=True)
class Preview:
    """Real clips (N, 3, T, size, size) in −1…1, their captions, and the prompts that the text encoder reads."""

    clips: Tensor
    captions: list[str]
    prompts: list[str]

    @classmethod
    def of(
        cls, config: OutputConfig, reader: SampleReader, indices: Iterable[int], processes: Processes
    ) -> "Preview | None":
        """Read the first usable samples among the numbers `indices`, of which at most ATTEMPTS are tried; None if there
        is none or the settings ask for no grid. Every process must call this: one reads, so that all agree."""
        if not config.sample_every:
            return None
        tried = (reader.try_show(int(index)) for index in itertools.islice(indices, ATTEMPTS))
        usable = (found for found in tried if not isinstance(found, Skip))
        found = processes.gather(list(itertools.islice(usable, config.sample_count if processes.is_main else 0)))
        if not found:
            return None
        clips, captions, prompts = zip(*found, strict=True)
        return cls(torch.stack([to_unit_range(clip) for clip in clips]), list(captions), list(prompts))

    def save(self, learner: Learner, path: Path) -> None:
        """Sample a clip for every caption with the averaged weights and write the animated grid; every process must
        call this. Always from the same noise, so that grids can be compared."""
        config = learner.config
        with learner.as_pipeline() as pipeline:
            shown = pipeline(
                self.prompts,
                num_inference_steps=config.output.sample_steps,
                sampler=config.output.sampler,
                generator=torch.Generator().manual_seed(config.system.seed),
                output_type="pt",
                progress=False,
            )
        if not learner.processes.is_main:
            return
        images = cast(Tensor, shown)
        sampled = images if images.dim() == 5 else images.unsqueeze(2)
        path.parent.mkdir(exist_ok=True)
        save_grid(path, {"real": self.clips, "sampled": sampled}, self.captions, config.data.frame_rate)
