"""Text-to-video on captioned clips, WebVid-10M or any other, in the stages of the Matryoshka Diffusion paper.

    python recipes/t2v_webvid.py --preset tiny --data recipes/data/clips-*.tar --out runs/tiny
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 64 --data IMAGES --out runs/64
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 16x64 --data CLIPS --out runs/b --init-from runs/64
    torchrun --nproc-per-node=8 recipes/t2v_webvid.py --preset 16x256 --data CLIPS --out runs/c --init-from runs/b

The same command again continues a run. Every option after --preset replaces a value of the preset. The batch size is
per process: the full-size presets give the paper's global batch on its 32 GPUs.
"""

import argparse
import sys
from dataclasses import replace

import tyro

from mdm_models.training.config import TrainConfig
from mdm_models.training.errors import TrainingError
from mdm_models.training.trainer import train

GPUS = 32  # the paper's number of processes; TrainConfig.batch_size is that of one


def tiny(data: tuple[str, ...], out: str) -> TrainConfig:
    """8 frames of 32² around one, on a CPU: minutes on two cores."""
    return TrainConfig(
        data=data,
        out=out,
        model="mdm_t2v_tiny",
        frames=8,
        size=32,
        batch_size=8,
        steps=400,
        lr=1e-3,
        warmup=50,
        ema_decay=0.995,
        save_every=200,
        sample_every=200,
        sample_steps=30,
        workers=1,
    )


def images_64(data: tuple[str, ...], out: str) -> TrainConfig:
    """Stage one, the innermost model on images or single frames of 64²: global batch 2048, 500 000 steps."""
    return TrainConfig(
        data=data,
        out=out,
        model="mdm_t2i_64",
        frames=1,
        size=64,
        text_width=512,
        text_layers=8,
        text_tokens=77,
        batch_size=2048 // GPUS,
        steps=500_000,
        log_every=100,
        save_every=5_000,
        sample_every=10_000,
    )


def clips_16x64(data: tuple[str, ...], out: str) -> TrainConfig:
    """Stage two, 16 frames of 64² around stage one: global batch 512, 500 000 steps."""
    return replace(images_64(data, out), model="mdm_t2v_64", frames=16, batch_size=512 // GPUS)


def clips_16x256(data: tuple[str, ...], out: str) -> TrainConfig:
    """Stage three, 16 frames of 256² around stage two: global batch 128, 300 000 steps."""
    stage_two = clips_16x64(data, out)
    return replace(stage_two, model="mdm_t2v_256", size=256, batch_size=128 // GPUS, steps=300_000)


PRESETS = {"tiny": tiny, "64": images_64, "16x64": clips_16x64, "16x256": clips_16x256}


def parse(arguments: list[str]) -> TrainConfig:
    """The preset that the command line names, with the fields that it replaces."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny")
    chosen, rest = first.parse_known_args(arguments)
    choices = "\n".join(f"  --preset {name:8} {preset.__doc__}" for name, preset in PRESETS.items())
    description = f"{__doc__}\n{choices}\n\nDefaults below are those of --preset {chosen.preset}."
    default = PRESETS[chosen.preset](data=tyro.MISSING, out=tyro.MISSING)
    return tyro.cli(TrainConfig, args=rest, default=default, description=description)


def main() -> int:
    try:
        train(parse(sys.argv[1:]))
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
