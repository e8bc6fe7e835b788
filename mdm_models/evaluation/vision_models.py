"""Vision models of Hugging Face's `transformers` as feature extractors: DINOv2 for FD-DINOv2, CLIP for CMMD."""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_models.evaluation.features import FeatureExtractor, needing

LARGE = 1024  # width of ViT-L, which the papers use
PREPROCESSOR = "preprocessor_config.json"


class VisionModel(FeatureExtractor):
    """The class token of DINOv2 (Stein et al. 2023, arXiv 2306.04675) or the image embedding of CLIP, of unit length
    (Jayasumana et al. 2024, arXiv 2401.09603), from a directory as save_pretrained writes it, with safetensors.

    Images are resized to the model's square, bicubic with antialiasing, and normalised as its preprocessor_config.json
    says. The distance is called fd_dinov2, and the kernel's cmmd, if the model is that of the paper, ViT-L/14 (at
    336²); those of others carry the directory's name. Raises ValueError or OSError.
    """

    def __init__(self, directory: Path):
        with needing("transformers"):
            from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        how = json.loads((directory / PREPROCESSOR).read_text())
        is_clip = config.model_type in ("clip", "clip_vision_model")
        if not is_clip and config.model_type != "dinov2":
            raise ValueError(f"its model is {config.model_type}; known are dinov2 and clip")
        loader = CLIPVisionModelWithProjection if is_clip else AutoModel
        network = loader.from_pretrained(directory, local_files_only=True, use_safetensors=True).eval()
        name = re.sub(r"\W+", "_", directory.resolve().name)
        vision = network.config
        large = vision.hidden_size == LARGE and vision.patch_size == 14
        width = vision.projection_dim if is_clip else vision.hidden_size
        super().__init__(name, network, width, "fd_dinov2" if large and not is_clip else "")
        self.is_clip = is_clip
        self.kernel_metric = "cmmd" if large and is_clip and vision.image_size == 336 else f"cmmd_{name}"
        self.size = _side(how)
        self.resizing = f"resized to {self.size}², bicubic"
        self.image_mean: Tensor
        self.image_std: Tensor
        for statistic in ("image_mean", "image_std"):
            self.register_buffer(statistic, torch.tensor(how[statistic]).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        found = self.network(pixel_values=(pixels - self.image_mean) / self.image_std)
        return F.normalize(found.image_embeds, dim=1) if self.is_clip else found.pooler_output


def _side(how: dict) -> int:
    """Of the square that a model sees, by its preprocessor's settings, which have had several forms."""
    size = how.get("crop_size") or how["size"]
    return size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
