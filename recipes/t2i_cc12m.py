"""Text-to-image on captioned images, CC12M or any other, in the stages of the Matryoshka Diffusion paper.

    python recipes/t2i_cc12m.py --preset tiny-32 --data recipes/data/images-*.tar --out runs/32
    python recipes/t2i_cc12m.py --preset tiny-64 --data recipes/data/images-*.tar --out runs/64 --init-from runs/32

    torchrun --nproc-per-node=8 recipes/t2i_cc12m.py --preset 64 --data CC12M --out runs/a
    torchrun --nproc-per-node=8 recipes/t2i_cc12m.py --preset 256 --data CC12M --out runs/b --init-from runs/a
    torchrun --nproc-per-node=8 recipes/t2i_cc12m.py --preset 1024 --data CC12M --out runs/c --init-from runs/b

CC12M becomes shards by `mdm prepare captions` or img2dataset. The captions can be encoded once, by `mdm precompute
CC12M --encoder google/flan-t5-xl --out FEATURES`; --text-encoder FEATURES then takes the place of the encoder. The same
command again continues a run. Every option after --preset replaces a value of the preset. The batch size is that of all
processes together; micro_batch is what goes through one of them at once, chosen for 80 GB; --preset 64-40gb and so on
take less of it, for an A100 of 40 GB.
"""

import sys

from mdm_models.commands.train import Preset, run_recipe
from mdm_models.data.config import DataConfig
from mdm_models.training.config import (
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
    changed,
)


def tiny_32(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage one in small, 32² on a CPU: minutes on two cores."""
    return TrainConfig(
        out,
        DataConfig(shards, size=32, workers=1),
        ModelConfig("mdm_t2i_tiny"),
        optimizer=OptimizerConfig(batch_size=16, steps=600, lr=1e-3, warmup=50, ema_decay=0.995),
        output=OutputConfig(save_every=200, sample_every=200, sample_steps=30),
    )


def tiny_64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two in small, 64² around the first one."""
    return changed(tiny_32(shards, out), model="mdm_t2i_tiny_64", size=64)


def stage_64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage one, the innermost model at 64²: batch 2048, 500 000 steps."""
    return TrainConfig(
        out,
        DataConfig(shards, size=64),
        ModelConfig("mdm_t2i_64", text_encoder="google/flan-t5-xl", text_tokens=128),
        optimizer=OptimizerConfig(batch_size=2048, micro_batch=64, steps=500_000),
        evaluation=EvaluationConfig(evaluate_every=10_000),
        output=OutputConfig(log_every=100, save_every=5_000, sample_every=10_000),
    )


def stage_256(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two, 256² around stage one: batch 1024, two thirds of it at 256², 500 000 steps."""
    stage = changed(stage_64(shards, out), model="mdm_t2i_256", size=256, batch_size=1024, micro_batch=32)
    return changed(stage, level_shares=(2 / 3, 1.0))


def stage_1024(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage three, 1024² around stage two: batch 768, losses weighted 16 : 4 : 1, 100 000 steps."""
    stage = changed(stage_64(shards, out), model="mdm_t2i_1024", size=1024, batch_size=768, micro_batch=12)
    objective = ObjectiveConfig(shift_power=2.0, level_weights=(16.0, 4.0, 1.0))
    return changed(stage, steps=100_000, objective=objective)


def on_40_gb(preset: Preset, micro_batch: int) -> Preset:
    """The preset with fewer samples going through a process at once, which is all that its memory depends on."""

    def smaller(shards: tuple[str, ...], out: str) -> TrainConfig:
        return changed(preset(shards, out), micro_batch=micro_batch)

    smaller.__doc__ = f"{(preset.__doc__ or '').rstrip('.')}, for GPUs of 40 GB: {micro_batch} samples at once."
    return smaller


PRESETS = {
    "tiny-32": tiny_32,
    "tiny-64": tiny_64,
    "64": stage_64,
    "256": stage_256,
    "1024": stage_1024,
    "64-40gb": on_40_gb(stage_64, 32),
    "256-40gb": on_40_gb(stage_256, 16),
    "1024-40gb": on_40_gb(stage_1024, 4),
}

if __name__ == "__main__":
    sys.exit(run_recipe(PRESETS, __doc__))
