"""Untrained pipelines as small as they come, saved as those are that come with the package."""

from pathlib import Path

import torch

from mdm_models import Pipeline, PipelineConfig, UNetConfig, build_model
from mdm_models.text import TransformerTextEncoder

IMAGE_MODEL = UNetConfig(
    channels=(16, 16), blocks=(1, 1), attention=(0, 1), num_heads=2, embed_dim=16, norm_groups=4, context_dim=16
)
NESTED_MODEL = UNetConfig(channels=(16, 16), blocks=(1, 1), embed_dim=16, norm_groups=4, inner=IMAGE_MODEL)
CLIP_MODEL = UNetConfig(
    channels=(32, 32, 32),
    blocks=(1, 1, 1),
    kind="time",
    temporal_attention=(0, 1, 0),
    embed_dim=16,
    norm_groups=4,
    inner=IMAGE_MODEL,
)
CAPTIONS = ["a red apple", "red apple, noto style"]


def small_pipeline(model: UNetConfig = NESTED_MODEL, size: int = 16) -> Pipeline:
    torch.manual_seed(0)
    encoder = TransformerTextEncoder(16, layers=1, num_heads=8, max_tokens=8).pruned(CAPTIONS)
    return Pipeline(build_model(model), encoder, PipelineConfig(size, guidance_scale=2.0, num_inference_steps=3))


def save_as_shipped(folder: Path, name: str, model: UNetConfig = NESTED_MODEL, size: int = 16) -> Path:
    """A model of that name in a folder that stands for mdm_models/weights."""
    small_pipeline(model, size).to(dtype=torch.bfloat16).save_pretrained(folder / name)
    return folder / name
