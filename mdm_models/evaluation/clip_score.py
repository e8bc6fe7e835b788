"""CLIP score: how well images fit their captions, by an open_clip model.

100 · cos(image, caption), the mean over all samples (Hessel et al. 2021, arXiv 2104.08718, who scale by 2.5 instead of
100 and cut off below 0), which is torchmetrics' scale. A clip's is the mean over its frames (Wu et al. 2021, GODIVA).
Models differ widely: compare only scores of one.
"""

import os
from typing import Any

import torch
from einops import rearrange
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchvision.transforms.functional import to_pil_image

from mdm_models.text.clip import load_open_clip

HUB = "hf-hub:"
BATCH = 64  # frames that the model sees at once


class ClipScore:
    """Measures the CLIP score of images (N, 3, H, W), or clips (N, 3, T, H, W), uint8, with N captions; captions longer
    than the model's context are cut. The ranks of a distributed run add their shares and get the score of all.

    path_or_id: a directory as open_clip saves it, or the id of a model on the Hugging Face hub. Raises ValueError in
    one line if it cannot be loaded.
    """

    name = "clip_score"

    def __init__(self, path_or_id: str, device: torch.device):
        name = path_or_id if os.path.isdir(path_or_id) or path_or_id.startswith(HUB) else HUB + path_or_id
        model: Any
        model, self._tokenize = load_open_clip(name, f"CLIP model {path_or_id}")
        self._preprocess: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        self._model = model.requires_grad_(False).eval().to(device)
        self._device = device
        self._mean = MeanMetric().set_dtype(torch.float64).to(device)

    @torch.no_grad()
    def add(self, images: Tensor, captions: list[str]) -> None:
        """Add images (N, 3, H, W) or clips (N, 3, T, H, W), uint8, and their captions; N may be 0."""
        if not captions:
            self._mean.update(torch.zeros(0, device=self._device))
            return
        texts = self._model.encode_text(self._tokenize(captions).to(self._device), normalize=True)
        clips = images if images.dim() == 5 else images.unsqueeze(2)
        frames = rearrange(clips, "n c t h w -> (n t) c h w").cpu()
        seen = [self._model.encode_image(self._pixels(batch), normalize=True) for batch in frames.split(BATCH)]
        by_frame = rearrange(torch.cat(seen), "(n t) d -> n t d", n=len(clips)) @ texts[:, :, None]  # (N, T, 1)
        self._mean.update(100 * by_frame.mean((1, 2)).double())

    def _pixels(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) uint8 → (N, 3, size, size), prepared by the model's own transform."""
        return torch.stack([self._preprocess(to_pil_image(frame)) for frame in frames]).to(self._device)

    def compute(self) -> float:
        """Give the mean over what was added, which is forgotten."""
        score = self._mean.compute().item()
        self._mean.reset()
        return score
