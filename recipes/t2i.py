"""Text-to-image on your own pictures: a few hundred are enough to see it learn, on a CPU.

    mdm train t2i --data PICTURES --out runs/own
    mdm sample runs/own "a red apple" "a dog" --out shown

PICTURES is a folder of captioned pictures (`mdm prepare folder --help` tells how they are captioned), or shards. The
model begins from the weights that come with this package, if there are any for it. How large a batch is, how many steps
there are and over how many of them weights are averaged follow from the number of pictures; every option replaces what
was chosen. The same command again continues a run.
"""

import os
import sys

import tyro

from mdm_models.commands.train import run_recipe
from mdm_models.data.config import DataConfig
from mdm_models.data.prepare.captioned_folder import count_samples
from mdm_models.training.config import ModelConfig, ObjectiveConfig, OptimizerConfig, OutputConfig, TrainConfig
from mdm_models.zoo import list_models

MODEL, NESTED = "mdm_t2i_emoji_64", "mdm_t2i_emoji_16"
LEAST_SEEN, MOST_SEEN = 16_000, 1_600_000  # samples in a run; two cores see some 16 000 in a quarter of an hour
EPOCHS = 80  # between these bounds
FEW = 100  # pictures, of which none can be spared to judge by


def own_small(shards: tuple[str, ...], out: str) -> TrainConfig:
    """64² around 16², 22 million parameters; two cores make a model of 200 pictures in about a quarter of an hour."""
    known = shards is not tyro.MISSING
    count = count_samples(shards) if known else 200
    batch = 16 if count < 2000 else 32
    steps = min(max(EPOCHS * count, LEAST_SEEN), MOST_SEEN) // batch
    shipped = next((name for name in (MODEL, NESTED) if name in list_models(pretrained=True)), "")
    if known and os.environ.get("RANK", "0") == "0":
        begins = f"begins from the shipped {shipped}" if shipped else "no weights are shipped for it: it begins fresh"
        seen = steps * batch / max(count, 1)
        print(f"own-small for {count} pictures: {steps} steps of {batch}, each seen {seen:.0f} times; {begins}")
    return TrainConfig(
        out,
        DataConfig(shards, size=64, holdout=0 if count < FEW else 0.03, workers=0),
        ModelConfig(MODEL, text_width=128, text_layers=2, text_tokens=24, init_from=shipped),
        ObjectiveConfig(
            prediction="x0",
            loss_target="v",
            times="logit_normal",
            times_mean=0.5,
            times_deviation=1.5,
            shift_power=2.0,
            level_shares=(0.25, 1.0),
        ),
        OptimizerConfig(
            batch_size=batch, steps=steps, lr=3e-4 if shipped else 6e-4, warmup=100, ema_decay=1 - 20 / steps
        ),
        output=OutputConfig(
            save_every=100, keep=2, sample_every=max(100, steps // 10), sample_count=16, sample_steps=25
        ),
    )


PRESETS = {"own-small": own_small}

if __name__ == "__main__":
    sys.exit(run_recipe(PRESETS, __doc__))
