"""What sampled images are compared with: real ones, by the Fréchet distance, and their captions, by CLIP score."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdm_models.evaluation.extractors import load_extractor
from mdm_models.evaluation.features import needing

if TYPE_CHECKING:  # seconds to import, which a run without them need not wait for
    from mdm_models.evaluation.clip_score import ClipScore
    from mdm_models.evaluation.frechet import FrechetDistance
    from mdm_models.evaluation.kernel_distance import KernelDistance


@dataclass(frozen=True)
class Comparison:
    """What samples are compared by: frechet, clip, kernel (of the features of `frechet`), each of which may be None;
    without the first two nothing need be sampled."""

    frechet: "FrechetDistance | None"
    clip: "ClipScore | None"
    kernel: "KernelDistance | None" = None

    @classmethod
    def of(
        cls,
        feature_extractor: str,
        clip_model: str,
        image_size: int,
        frames: int,
        device: torch.device,
        with_kernel: bool = False,
    ) -> "Comparison":
        """Load the networks that are named, of which "" leaves one out; frames: of a clip, 1 for images. Raises
        ValueError in one line that names the option and the remedy."""
        frechet = clip = kernel = None
        if feature_extractor or clip_model:
            with needing("torchmetrics", "torchvision"):
                from mdm_models.evaluation.clip_score import ClipScore
                from mdm_models.evaluation.frechet import FrechetDistance
                from mdm_models.evaluation.kernel_distance import KernelDistance
        if feature_extractor:
            extractor = load_extractor(feature_extractor, image_size, frames)
            frechet = FrechetDistance(extractor, frames > 1, device)
            kernel = KernelDistance(extractor, frames > 1, device) if with_kernel else None
        if clip_model:
            clip = ClipScore(clip_model, device)
        return cls(frechet, clip, kernel)

    @property
    def needs_samples(self) -> bool:
        return self.frechet is not None or self.clip is not None

    def add(self, real: Tensor, sampled: Tensor, captions: list[str]) -> None:
        """Add real and sampled images (N, 3, H, W) or clips (N, 3, T, H, W), uint8, and their captions; N may be 0."""
        if self.frechet is not None:
            if not self.frechet.has_reference:
                features = self.frechet.add_real(real)
                if self.kernel is not None:
                    self.kernel.add_real(features)
            features = self.frechet.add_sampled(sampled)
            if self.kernel is not None:
                self.kernel.add_sampled(features)
        if self.clip is not None:
            self.clip.add(sampled, captions)

    def save_reference(self, path: Path, is_main: bool) -> None:
        """Keep what is known of the real images' features, for `load_reference`; all ranks call it."""
        features = None if self.kernel is None else self.kernel.real_features()
        if self.frechet is not None:
            self.frechet.save_reference(path, is_main, features)

    def load_reference(self, path: Path, is_main: bool) -> None:
        """Take a file's statistics in place of real images; all ranks call it. Raises ValueError in one line if it does
        not fit."""
        features = None if self.frechet is None else self.frechet.load_reference(path, is_main)
        if self.kernel is not None:
            if features is None:
                raise ValueError(
                    f"reference statistics {path} have no features, of which {self.kernel.name} is made; delete the "
                    "file, and the same command writes it anew with them, or leave --kernel-distance out"
                )
            self.kernel.take_real(features)

    def results(self) -> dict[str, float]:
        """Give each distance and score by its name, of all ranks' samples; what was sampled is forgotten."""
        found = {}
        if self.frechet is not None:
            found[self.frechet.name] = self.frechet.compute()
        if self.kernel is not None:
            found[self.kernel.name] = self.kernel.compute()
        if self.clip is not None:
            found[self.clip.name] = self.clip.compute()
        return found
