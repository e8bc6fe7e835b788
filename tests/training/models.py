"""The smallest models that training can be tested on, a batch for them, and settings of a run."""

from pathlib import Path

import torch

from mdm_models.config import UNetConfig
from mdm_models.data.config import DataConfig
from mdm_models.data.stream import Batch
from mdm_models.training.config import (
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SystemConfig,
    TrainConfig,
)

IMAGE_MODEL = UNetConfig(
    channels=(32, 32), blocks=(1, 1), attention=(0, 1), mid_blocks=True, num_heads=2, embed_dim=32, context_dim=32
)
CLIP_MODEL = UNetConfig(
    channels=(32, 32, 32), blocks=(1, 1, 1), kind="time", temporal_attention=(0, 1, 0), embed_dim=32, inner=IMAGE_MODEL
)
NESTED_MODEL = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=IMAGE_MODEL)

# For what a run does whatever its model: most of its time goes by the number of tensors that are saved and loaded.
LEAST_MODEL = UNetConfig(
    channels=(16,), blocks=(1,), attention=(1,), num_heads=2, embed_dim=16, norm_groups=4, context_dim=32
)
LEAST_NESTED_MODEL = UNetConfig(channels=(16,), blocks=(1,), embed_dim=16, norm_groups=4, inner=LEAST_MODEL)
LEAST_CLIP_MODEL = UNetConfig(
    channels=(16, 16, 16), blocks=(1, 1, 1), kind="time", embed_dim=16, norm_groups=4, inner=LEAST_MODEL
)


def settings(shard: Path, out: Path) -> TrainConfig:
    """Six steps on clips of 4 frames of 16², without worker processes."""
    return TrainConfig(
        str(out),
        DataConfig((str(shard),), size=16, frames=4, holdout=0, workers=0),
        ModelConfig("small", text_width=32, text_layers=1, text_tokens=8),
        optimizer=OptimizerConfig(batch_size=2, steps=6, lr=1e-3, warmup=2),
        system=SystemConfig(precision="float32"),  # also on a CPU with units for bfloat16
        output=OutputConfig(log_every=2, save_every=3, sample_every=0, sample_steps=2, sample_count=2),
    )


def clips(count: int = 2, frames: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, frames, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(images, ["a cat"] * count, [])
