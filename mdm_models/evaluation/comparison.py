"""What sampled images are compared with: real ones, by the Fréchet distance, and their captions, by CLIP score."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdm_models.evaluation.extractors import load_extractor
from mdm_models.evaluation.features import needing

if TYPE_CHECKING:  # seconds to import, which a run without them need not wait for
    from mdm_models.evaluation.clip_score import ClipScore
    from mdm_models.evaluation.frechet import FrechetDistance


@dataclass(frozen=True)
class Comparison:
    """frechet, clip: each may be None; without either nothing need be sampled."""

    frechet: "FrechetDistance | None"
    clip: "ClipScore | None"

    @classmethod
    def of(
        cls, feature_extractor: str, clip_model: str, image_size: int, is_video: bool, device: torch.device
    ) -> "Comparison":
        """"" leaves one out. Raises ValueError in one line that names the option and the remedy."""
        frechet = clip = None
        if feature_extractor or clip_model:
            with needing("torchmetrics", "torchvision"):
                from mdm_models.evaluation.clip_score import ClipScore
                from mdm_models.evaluation.frechet import FrechetDistance
        if feature_extractor:
            frechet = FrechetDistance(load_extractor(feature_extractor, image_size), is_video, device)
        if clip_model:
            clip = ClipScore(clip_model, device)
        return cls(frechet, clip)

    @property
    def needs_samples(self) -> bool:
        return self.frechet is not None or self.clip is not None

    def add(self, real: Tensor, sampled: Tensor, captions: list[str]) -> None:
        """Images (N, 3, H, W) or clips (N, 3, T, H, W) uint8 and their captions; N may be 0."""
        if self.frechet is not None:
            if not self.frechet.has_reference:
                self.frechet.add_real(real)
            self.frechet.add_sampled(sampled)
        if self.clip is not None:
            self.clip.add(sampled, captions)

    def results(self) -> dict[str, float]:
        """Each by its name, of all ranks' samples; what was sampled is forgotten."""
        found = {}
        if self.frechet is not None:
            found[self.frechet.name] = self.frechet.compute()
        if self.clip is not None:
            found[self.clip.name] = self.clip.compute()
        return found
