"""Draw with every model that comes along, then teach one of them 32 clips in two minutes: what `make demo` runs.

    python recipes/demo.py --out runs/demo

writes OUT/NAME.webp, the samples of a model at all its resolutions; OUT/taught.webp, real clips above what the model
drew for their captions before and after; and OUT/tuned, the run, which `mdm sample` takes. Where no model comes along,
one is taught from nothing.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mdm_models.commands.line import exit_code, parse
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import to_unit_range
from mdm_models.pipeline import Pipeline
from mdm_models.recipes.t2v_webvid import tiny
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.config import ObjectiveConfig, OptimizerConfig, OutputConfig, TrainConfig, changed
from mdm_models.training.monitor.grid import save_grid
from mdm_models.training.trainer import train_whole
from mdm_models.zoo import list_models

CLIPS = tuple(str(path) for path in sorted((Path(__file__).parent / "data").glob("clips-*.tar")))
PROMPTS = (
    "red apple, 3d style",
    "penguin, flat style",
    "grinning face, noto style",
    "tropical fish, twemoji style",
    "hot air balloon, gradient style",
    "cactus, 3d style",
    "fire engine, noto style",
    "soccer ball, blob style",
)
CLIP_PROMPTS = (
    "penguin",
    "grinning face",
    "tropical fish",
    "fire engine",
    "red heart",
    "butterfly",
    "rocket",
    "rooster",
)  # whose captions name no style, as all of them are in one
FIRST = 5  # steps of training that tell how long one takes


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/demo")
    """folder for pictures and run"""
    seconds: float = 120
    """of teaching"""
    data: tuple[str, ...] = CLIPS
    """shards of what is taught"""
    seed: int = 0
    """of everything"""


def demo(options: Options) -> None:
    """Draw with every shipped model, teach one of them, and name the files. Raises TrainingError, OSError or ValueError
    in one line."""
    options.out.mkdir(parents=True, exist_ok=True)
    files = [draw(name, options) for name in list_models(pretrained=True)]
    files.append(teach(options))
    print("\nOpen these files, with a browser say:")
    for file in files:
        print(f"  {file}")
    print("and draw what you like:\n  mdm web")


def draw(name: str, options: Options) -> Path:
    """Draw a grid with a row for each resolution of a model; → its file."""
    pipeline = Pipeline.from_pretrained(name, dtype=torch.float32)
    began = time.perf_counter()
    prompts: list[str] = [*(CLIP_PROMPTS if pipeline.model.config.is_video else PROMPTS)]
    levels = _sampled(pipeline, prompts, options.seed)
    print(f"{name}: {len(prompts)} samples in {time.perf_counter() - began:.0f} s")
    sizes = ["x".join(str(side) for side in level.shape[2:] if side > 1) for level in levels]
    rows = {size: _even(level, levels[0].shape[2]) for size, level in zip(sizes, levels, strict=True)}
    save_grid(file := options.out / f"{name}.webp", rows, prompts, pipeline.config.frame_rate)
    return file


def teach(options: Options) -> Path:
    """Train for the time given; → the grid of before and after."""
    config, name = settings(options)
    samples = ShardedSamples(open_shards(config.data))
    reader = SampleReader(samples, config.data)
    clips, captions = zip(*(reader.read(i) for i in range(min(len(PROMPTS), len(samples)))), strict=True)
    real = to_unit_range(torch.stack(clips))
    rows, way = {"real": real}, {}
    if name:
        before = Pipeline.from_pretrained(name, dtype=torch.float32)
        way = {key: getattr(before.config, key) for key in ("num_inference_steps", "sampler")}
        rows["before"] = _shown(before, captions, options.seed)
    print(f"teaching {config.model.model} {len(samples)} clips for {options.seconds:.0f} s")
    run = train_for(config, options.seconds)
    after = Pipeline.from_pretrained(run / "model", dtype=torch.float32)
    after.config = dataclasses.replace(after.config, **way)  # as before, so that only the weights differ
    rows["after"] = _shown(after, captions, options.seed)
    save_grid(file := options.out / "taught.webp", rows, list(captions), config.data.frame_rate)
    return file


def settings(options: Options) -> tuple[TrainConfig, str]:
    """Say how which shipped model is taught: a video model if there is one; "" if none is shipped."""
    config = changed(tiny(options.data, str(options.out / "tuned")), workers=0, seed=options.seed, holdout=0.0)
    config = changed(config, log_every=1, save_every=1000, sample_every=0, steps=FIRST)
    shipped = list_models("*t2v*", pretrained=True) + list_models("*", pretrained=True)
    if not shipped:
        return config, ""
    pipeline = Pipeline.from_pretrained(name := shipped[0])
    known, encoder, shape = pipeline.config, pipeline.text_encoder, pipeline.shapes[0]
    config = changed(config, model=name, init_from=name, size=known.size, frames=shape[1] if len(shape) == 4 else 1)
    if isinstance(encoder, TransformerTextEncoder):
        sizes = encoder.sizes
        config = changed(
            config, text_width=sizes["width"], text_layers=sizes["layers"], text_tokens=sizes["max_tokens"]
        )
    return changed(
        config,
        frame_rate=known.frame_rate,
        clip_start="first",  # as the shipped model saw clips: their things at rest
        objective=ObjectiveConfig(
            known.shift_power,
            known.unshifted_size,
            times="logit_normal",
            times_mean=0.5,
            times_deviation=1.5,
            prediction=cast(Any, known.prediction),  # one of the names that training knows
            loss_target="v",
        ),
        optimizer=OptimizerConfig(batch_size=8, steps=FIRST, lr=2e-4, warmup=10, ema_decay=0.96),
        output=OutputConfig(log_every=1, save_every=1000, sample_every=0, guidance_scale=known.guidance_scale),
    ), name


def train_for(config: TrainConfig, seconds: float) -> Path:
    """Train as many steps as take about that long; more of them if the run had some already. → the run directory."""
    done = len(_step_seconds(Path(config.out)))
    run = train_whole(changed(config, steps=done + FIRST))
    step = min(_step_seconds(run)[-FIRST:])
    return train_whole(changed(config, steps=done + FIRST + max(1, int(seconds / step))))


def _step_seconds(run: Path) -> list[float]:
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [record["step_seconds"] for record in records if record["kind"] == "training"]


def _shown(pipeline: Pipeline, captions: tuple[str, ...], seed: int) -> Tensor:
    return _sampled(pipeline, list(captions), seed)[0]


def _sampled(pipeline: Pipeline, prompts: list[str], seed: int) -> list[Tensor]:
    """A sample a prompt at each resolution, (N, 3, T, H, W) in −1…1; T = 1 of pictures."""
    prompts = prompts if pipeline.text_encoder is not None else [""] * len(prompts)
    levels = cast(list[Tensor], pipeline(prompts, seed=seed, output_type="pt", return_levels=True))
    return [level if level.dim() == 5 else level.unsqueeze(2) for level in levels]


def _even(clips: Tensor, frames: int) -> Tensor:
    """The same clips with so many frames, each shown longer."""
    return clips.repeat_interleave(frames // clips.shape[2], dim=2)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code("demo.py", lambda: demo(parse("demo.py", __doc__, Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
