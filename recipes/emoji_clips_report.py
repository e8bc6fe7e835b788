"""How the clips of recipes/emoji.py look, beside real ones: those that were trained on, and those held out.

    python recipes/emoji_clips_report.py runs/emoji-clips --data FLUENT/fluent-video-*.tar --out runs/emoji-clips

writes evaluation.json and two uncurated animated grids, held_out.webp and trained.webp: pairs of a real clip, left, and
a sample for its caption, right. nearest_is_right is the share of held-out captions whose sample has, among the real
held-out clips, its own as the nearest, right_of_5 among the nearest five (features of EfficientNet-lite0, averaged over
the frames); frechet_video_… is the distance of these samples from these clips in what is seen and how it changes.
"""

import sys
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from mdm_models.commands.line import exit_code, parse
from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader, Skip
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import split
from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.extractors import EFFICIENTNET_LITE0, load_extractor
from mdm_models.evaluation.retrieval import share_right
from mdm_models.pipeline import Pipeline
from mdm_models.recipes.emoji_samples import Options, drawn, open_model, save_pairs, save_results


def report(options: Options) -> None:
    """Draw clips for captions, save them beside real ones, and judge those that were held out. Raises TrainingError,
    OSError or ValueError in one line."""
    pipeline = open_model(options)
    if not pipeline.model.config.is_video:
        raise ValueError(f"{options.model} draws pictures, which recipes/emoji_report.py judges")
    held_out, trained = clips(options, pipeline)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (real, captions) in {"trained": trained, "held_out": held_out}.items():
        sampled = drawn(pipeline, captions, options)
        save_pairs(
            options.out / f"{name}.webp", real[: options.grid], sampled[: options.grid], pipeline.config.frame_rate
        )
    save_results(options, judged(real, sampled, captions, pipeline.device))


def clips(options: Options, pipeline: Pipeline) -> tuple[tuple[Tensor, list[str]], tuple[Tensor, list[str]]]:
    """Read real clips (N, 3, T, H, W) uint8 and their captions: those held out, and as many trained ones as a grid
    shows. Raises ValueError if there are none."""
    _, frames, size, _ = pipeline.shapes[0]
    config = DataConfig(
        options.data,
        size=size,
        frames=frames,
        frame_rate=pipeline.config.frame_rate,
        clip_start="first",
        holdout=options.holdout,
        workers=0,
    )
    samples = ShardedSamples(open_shards(config))
    reader = SampleReader(samples, config)
    training, held_out = split(samples, options.holdout)
    chosen = np.random.default_rng(options.seed).permutation(training)[: options.grid]
    return _read(reader, held_out), _read(reader, chosen)


def _read(reader: SampleReader, numbers: Iterable[int]) -> tuple[Tensor, list[str]]:
    found = [read for read in (reader.try_read(int(number)) for number in numbers) if not isinstance(read, Skip)]
    if not found:
        raise ValueError("none of the clips can be read as the model needs them")
    return torch.stack([clip for clip, _ in found]), [caption for _, caption in found]


def judged(real: Tensor, sampled: Tensor, captions: list[str], device: torch.device) -> dict[str, float]:
    """Judge clips (N, 3, T, H, W) uint8, each sampled for the caption of the real one of its number."""
    frames, size = real.shape[2], real.shape[-1]
    comparison = Comparison.of(EFFICIENTNET_LITE0, "", size, frames, device)
    comparison.add(real.to(device), sampled.to(device), captions)
    extractor = load_extractor(EFFICIENTNET_LITE0, size)
    queries, gallery = (
        extractor(each.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(each), -1)).mean(dim=1)
        for each in (sampled, real)
    )
    right = torch.arange(len(real))
    return {
        "held_out_clips": float(len(real)),
        "nearest_is_right": share_right(queries, gallery, right),
        "right_of_5": share_right(queries, gallery, right, among=5),
        **comparison.results(),
    }


def main(arguments: list[str] | None = None) -> int:
    program, arguments = "emoji_clips_report.py", sys.argv[1:] if arguments is None else arguments
    return exit_code(program, lambda: report(parse(program, __doc__, Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
