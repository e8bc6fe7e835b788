"""Class-conditional images, ImageNet or any other labelled set, in the stages of the Matryoshka Diffusion paper.

    mdm prepare imagenet ILSVRC2012/train --out IMAGENET
    torchrun --nproc-per-node=8 recipes/imagenet_256.py --preset 64 --data IMAGENET --out runs/a
    torchrun --nproc-per-node=8 recipes/imagenet_256.py --preset 256 --data IMAGENET --out runs/b --init-from runs/a

A sample's class is the number in KEY.cls. --text-encoder IMAGENET/classes.txt gives the classes names, to sample by,
and tells how many there are; --preset tiny takes any such folder of shards on a CPU. The same command again continues a
run. Every option after --preset replaces a value of the preset. The batch size is that of all processes together;
micro_batch is what goes through one of them at once, chosen for 80 GB; --preset 64-40gb and 256-40gb take less of it,
for an A100 of 40 GB.
"""

import sys

from mdm_models.commands.train import run_recipe
from mdm_models.data.config import DataConfig
from mdm_models.recipes.t2i_cc12m import on_40_gb
from mdm_models.training.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
    changed,
)


def stage_64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage one, the innermost model at 64²: batch 512, 300 000 steps."""
    return TrainConfig(
        out,
        DataConfig(shards, size=64, flip=True),
        ModelConfig("mdm_c2i_64", text_encoder="classes:1000", text_tokens=1),
        optimizer=OptimizerConfig(batch_size=512, micro_batch=64, steps=300_000),
        evaluation=EvaluationConfig(evaluate_every=10_000),
        output=OutputConfig(log_every=100, save_every=5_000, sample_every=10_000),
    )


def stage_256(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two, 256² around stage one: batch 256, 500 000 steps."""
    stage = changed(stage_64(shards, out), model="mdm_c2i_256", size=256)
    return changed(stage, batch_size=256, micro_batch=32, steps=500_000)


def tiny(shards: tuple[str, ...], out: str) -> TrainConfig:
    """32² on a CPU, for a look: minutes on two cores."""
    return TrainConfig(
        out,
        DataConfig(shards, size=32, flip=True, workers=1),
        ModelConfig("mdm_t2i_tiny", text_encoder="classes:1000", text_tokens=1),
        optimizer=OptimizerConfig(batch_size=16, steps=600, lr=1e-3, warmup=50, ema_decay=0.995),
        output=OutputConfig(save_every=200, sample_every=200, sample_steps=30),
    )


PRESETS = {
    "64": stage_64,
    "256": stage_256,
    "tiny": tiny,
    "64-40gb": on_40_gb(stage_64, 32),
    "256-40gb": on_40_gb(stage_256, 16),
}

if __name__ == "__main__":
    sys.exit(run_recipe(PRESETS, __doc__))
