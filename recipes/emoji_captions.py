"""At which noise a model of recipes/emoji.py makes use of its captions: what to draw the times of training by.

    python recipes/emoji_captions.py runs/emoji-16 --data EMOJI

prints, for some times, the mean squared error of the innermost level's image, predicted from its noisy one with the
right caption, with none, and with that of another drawing, for held-out drawings. The share is that of the training
samples whose times lie beyond, under the settings of the run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import Positional, arg

from mdm_models.commands.line import exit_code, parse
from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader, Skip
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import split, to_unit_range
from mdm_models.pipeline import Pipeline
from mdm_models.training.learner import times_of
from mdm_models.training.saved import open_pipeline
from mdm_models.training.settings import read_settings

SHARES = 100_000  # times that their shares are counted from


@dataclass(frozen=True)
class Options:
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """the directory of a run, be it over or not"""
    data: tuple[str, ...]
    """the shards that it was trained on"""
    drawings: int = 128
    """held-out ones, at most"""
    times: tuple[int, ...] = (100, 300, 500, 700, 800, 900, 960, 990)
    """of the model's 1000; noise increases with them"""
    seed: int = 0
    """of the noise"""


def report(options: Options) -> None:
    """Print how well a run's model predicts held-out drawings with the right caption, none, and another's. Raises
    TrainingError, OSError or ValueError in one line."""
    pipeline, settings = open_pipeline(options.run), read_settings(options.run)
    if settings is None:
        raise ValueError(f"{options.run} is no run: it has no config.json of one")
    images, captions = held_out(options.data, settings.data.size, settings.data.holdout, options.drawings)
    drawn = times_of(settings.objective, torch.linspace(0, 1, SHARES + 2)[1:-1].double(), 1000)
    print(f"{len(captions)} held-out drawings\n  time  right     none      another's  share beyond")
    for time in options.times:
        asked = {"right": captions, "none": [""] * len(captions), "another's": captions[1:] + captions[:1]}
        errors = [error(pipeline, images, prompts, time, options.seed) for prompts in asked.values()]
        print(f"{time:6}  " + "".join(f"{each:<10.4f}" for each in errors) + f" {(drawn >= time).double().mean():.3f}")


def held_out(shards: tuple[str, ...], size: int, holdout: float, count: int) -> tuple[Tensor, list[str]]:
    """Read held-out images (N, 3, size, size) in −1…1 and their captions, at most `count` of them. Raises ValueError if
    there are none."""
    config = DataConfig(shards, size=size, holdout=holdout, workers=0)
    samples = ShardedSamples(open_shards(config))
    reader = SampleReader(samples, config)
    _, numbers = split(samples, holdout)
    found = [reader.try_read(int(number)) for number in numbers[:count]]
    read = [each for each in found if not isinstance(each, Skip)]
    if not read:
        raise ValueError(f"no drawing of {' '.join(shards)} was held out and can be read")
    return to_unit_range(torch.stack([image[:, 0] for image, _ in read])), [caption for _, caption in read]


@torch.no_grad()
def error(pipeline: Pipeline, images: Tensor, captions: list[str], time: int, seed: int) -> float:
    """Give the mean squared error of the innermost level's predicted image at a time. Raises ValueError for a model
    that reads no captions."""
    if pipeline.text_encoder is None:
        raise ValueError("this model reads no captions")
    strides = [images.shape[-1] // shape[-1] for shape in pipeline.shapes]
    x_t = pipeline.diffusion.add_noise(images, torch.full((len(images),), time - 1), strides, seed=seed)
    preds = pipeline.model(x_t, torch.full((len(images),), time - 1), *pipeline.text_encoder(captions))
    levels = pipeline.diffusion.schedule.noise_levels(float(time))
    predicted = pipeline.diffusion.denoised(x_t, preds, levels, "none")[-1]
    return F.mse_loss(predicted, F.avg_pool2d(images, strides[-1])).item()


def main(arguments: list[str] | None = None) -> int:
    program, arguments = "emoji_captions.py", sys.argv[1:] if arguments is None else arguments
    return exit_code(program, lambda: report(parse(program, __doc__, Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
