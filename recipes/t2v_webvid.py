"""Text-to-video on captioned clips, WebVid-10M or any other, in the stages of the Matryoshka Diffusion paper.

    python recipes/t2v_webvid.py --preset tiny --data recipes/data/clips-*.tar --out runs/tiny
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 64 --data IMAGES --out runs/64
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 16x64 --data CLIPS --out runs/b --init-from runs/64
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 16x256 --data CLIPS --out runs/c --init-from runs/b

--images IMAGES --image-share 0.25 has a quarter of each chunk be single pictures, which train the levels inside the
clips': where captioned clips are few.

The same command again continues a run. Every option after --preset replaces a value of the preset. The batch size is
that of all processes together; micro_batch is what goes through one of them at once, chosen for 80 GB; --preset
16x64-40gb and so on take less of it, for an A100 of 40 GB.
"""

import sys

from mdm_models.commands.train import run_recipe
from mdm_models.data.config import DataConfig
from mdm_models.recipes.t2i_cc12m import on_40_gb, stage_64  # the innermost model, on images or single frames
from mdm_models.training.config import (
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
    changed,
)


def tiny(shards: tuple[str, ...], out: str) -> TrainConfig:
    """8 frames of 32² around one, on a CPU: minutes on two cores."""
    return TrainConfig(
        out,
        DataConfig(shards, size=32, frames=8, workers=1),
        ModelConfig("mdm_t2v_tiny"),
        optimizer=OptimizerConfig(batch_size=8, steps=400, lr=1e-3, warmup=50, ema_decay=0.995),
        output=OutputConfig(save_every=200, sample_every=200, sample_steps=30),
    )


def clips_16x64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two, 16 frames of 64² around stage one: batch 512, 500 000 steps."""
    return changed(stage_64(shards, out), model="mdm_t2v_64", frames=16, batch_size=512, micro_batch=8)


def clips_16x256(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage three, 16 frames of 256² around stage two: batch 128, 300 000 steps."""
    stage_two = clips_16x64(shards, out)
    return changed(stage_two, model="mdm_t2v_256", size=256, batch_size=128, micro_batch=4, steps=300_000)


PRESETS = {
    "tiny": tiny,
    "64": stage_64,
    "16x64": clips_16x64,
    "16x256": clips_16x256,
    "64-40gb": on_40_gb(stage_64, 32),
    "16x64-40gb": on_40_gb(clips_16x64, 4),
    "16x256-40gb": on_40_gb(clips_16x256, 1),
}

if __name__ == "__main__":
    sys.exit(run_recipe(PRESETS, __doc__))
