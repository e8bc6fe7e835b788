"""Text-to-image on drawings of things in eight styles, and text-to-video on clips around it, on a CPU or one GPU.

    mdm prepare emoji --out EMOJI
    torchrun --nproc-per-node=2 recipes/emoji.py --preset 16 --data EMOJI --out runs/emoji-16
    torchrun --nproc-per-node=2 recipes/emoji.py --preset 64 --data EMOJI --out runs/emoji-64 --init-from runs/emoji-16
    mdm prepare fluent-emoji --out FLUENT
    torchrun --nproc-per-node=2 recipes/emoji.py --preset 8x32 --data FLUENT/fluent-video-*.tar --out runs/emoji-clips \
        --init-from runs/emoji-16

Captions are "red apple, noto style". The same command again continues a run; every option after --preset replaces a
value of the preset. On one GPU the same stages are --preset gpu-16, gpu-64 and gpu-8x32, run by `python` in place of
torchrun: minutes. On a CPU give each process one thread (OMP_NUM_THREADS=1): two such processes train as fast as one
of two threads and, unlike those, lose little when other work runs beside them.
"""

import sys

from mdm_models.commands.train import run_recipe
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


def stage_16(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage one, 16²: decides what is seen, and is cheap: 3 GFLOP a sample. It decides under much noise, where words
    count most (docs/emoji.md), so that half of the times lie above 0.73."""
    return TrainConfig(
        out,
        DataConfig(shards, size=16, holdout=0.03, workers=0),
        ModelConfig("mdm_t2i_emoji_16", text_width=128, text_layers=2, text_tokens=24),
        ObjectiveConfig(
            prediction="x0", loss_target="v", times="logit_normal", times_mean=1.0, times_deviation=1.5
        ),
        OptimizerConfig(batch_size=32, steps=40_000, lr=6e-4, warmup=200, ema_decay=0.999),
        evaluation=EvaluationConfig(evaluate_every=2000, evaluate_samples=200),
        output=OutputConfig(save_every=100, keep=2, sample_every=1000, sample_count=16, sample_steps=25),
    )


def stage_64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two, 64² around the first one, which goes on learning from all samples, the new level from half of them. A
    level's noise is that of the lower one after averaging over its pixels (shift_power 2), so that the lower level goes
    on deciding what is seen; times lie somewhat lower than before, as details are drawn last."""
    stage = changed(stage_16(shards, out), model="mdm_t2i_emoji_64", size=64, shift_power=2.0, times_mean=0.5)
    return changed(stage, level_shares=(0.5, 1.0), sample_every=500)


def stage_8x32(shards: tuple[str, ...], out: str) -> TrainConfig:
    """8 frames of 32², 1⅓ seconds, around 8 frames of 16² around stage one: drawings in its 3-D style that move. Of a
    clip its beginning, which shows the thing at rest."""
    stage = changed(stage_16(shards, out), model="mdm_t2v_emoji", size=32, shift_power=2.0, times_mean=0.5)
    stage = changed(stage, level_shares=(0.5, 1.0, 1.0))
    stage = changed(stage, frames=8, frame_rate=6.0, clip_start="first", batch_size=8, ema_decay=0.998)
    return changed(stage, evaluate_every=1000, evaluate_samples=16, sample_every=500, sample_count=8)


def on_a_gpu(stage: TrainConfig, batch_size: int, steps: int, **values) -> TrainConfig:
    """The same model from larger batches; minutes of an H100."""
    stage = changed(stage, batch_size=batch_size, steps=steps, lr=8e-4, warmup=500, ema_decay=0.9995, cuda_graphs=True)
    return changed(stage, workers=8, log_every=50, save_every=2500, evaluate_every=2500, sample_every=2500, **values)


def gpu_16(shards: tuple[str, ...], out: str) -> TrainConfig:
    """16² on a GPU: 512 000 samples."""
    return on_a_gpu(stage_16(shards, out), 256, 2000)


def gpu_64(shards: tuple[str, ...], out: str) -> TrainConfig:
    """64² on a GPU: 3.1 million samples, 490 epochs, of which captions of things it never saw profit to the end."""
    return on_a_gpu(stage_64(shards, out), 256, 12_300)


def gpu_8x32(shards: tuple[str, ...], out: str) -> TrainConfig:
    """8 frames of 32² on a GPU: 256 000 clips."""
    return on_a_gpu(stage_8x32(shards, out), 64, 4000, cooldown=1333)


def gpu(shards: tuple[str, ...], out: str) -> TrainConfig:
    """128² and the 32² inside it together, five times as many weights, 15 million samples, for a GPU."""
    config = changed(stage_64(shards, out), model="mdm_t2i_emoji_128", size=128, batch_size=256, steps=60_000)
    config = changed(config, lr=4e-4, warmup=1000, ema_decay=0.9995, workers=8, compile=True)
    return changed(config, evaluate_every=5000, save_every=2000, sample_every=2000)


PRESETS = {
    "16": stage_16,
    "64": stage_64,
    "8x32": stage_8x32,
    "gpu-16": gpu_16,
    "gpu-64": gpu_64,
    "gpu-8x32": gpu_8x32,
    "gpu": gpu,
}

if __name__ == "__main__":
    sys.exit(run_recipe(PRESETS, __doc__))
