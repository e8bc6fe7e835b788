"""What the reports on recipes/emoji.py's pictures and clips share: uncurated samples for captions, beside real ones."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
from PIL import Image
from torch import Tensor
from tyro.conf import Positional, arg

from mdm_models.commands.line import Dtype, device_of, dtype_of
from mdm_models.pictures import save_animation, to_pictures, to_pixels
from mdm_models.pipeline import Pipeline
from mdm_models.storage import write_whole
from mdm_models.training.saved import open_pipeline

COLUMNS, CELL = 8, 64  # of a grid; pixels


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """a run, be it over or not, a saved model, or a name of `mdm models --pretrained`"""
    data: tuple[str, ...]
    """the shards that it was trained on"""
    out: Path
    """folder for the results"""
    holdout: float = 0.03
    """the share of them that training held out"""
    grid: int = 64
    """pairs in a grid"""
    steps: int | None = None
    """sampling steps; default: the model's"""
    sampler: str | None = None
    """ddim, ddpm, dpmpp_2m or heun; default: the model's"""
    guidance_scale: float | None = None
    """default: the model's"""
    guidance_interval: tuple[float, float] | None = None
    """the times, low and high in 0…1000, that have it; default: all"""
    seed: int = 0
    """of the samples and of the choice of captions"""
    batch_size: int = 25
    """samples at once"""
    quiet: bool = False
    """no progress bars"""
    device: str = "auto"
    """auto: a GPU if there is one"""
    dtype: Dtype | None = None
    """to compute in; default: bfloat16 on a GPU, float32 elsewhere"""


def open_model(options: Options) -> Pipeline:
    """Open the model on its device. Raises TrainingError, OSError, TypeError or ValueError in one line."""
    device = device_of(options.device)
    return open_pipeline(options.model).to(device, dtype_of(options.dtype, device))


def drawn(pipeline: Pipeline, captions: list[str], options: Options) -> Tensor:
    """Draw a sample for each caption, (N, 3, H, W) or, of clips, (N, 3, T, H, W), uint8 on the CPU."""
    batches = []
    for start in range(0, len(captions), options.batch_size):
        sampled = pipeline(
            captions[start : start + options.batch_size],
            num_inference_steps=options.steps,
            sampler=options.sampler,
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
            seed=options.seed + start,
            output_type="pt",
            progress=not options.quiet,
        )
        batches.append(torch.from_numpy(to_pixels(cast(Tensor, sampled))).movedim(-1, 1))
    return torch.cat(batches)


def save_pairs(path: Path, real: Tensor, sampled: Tensor, frame_rate: float = 1.0) -> None:
    """Save a grid of pictures (N, 3, H, W) uint8, or clips (N, 3, T, H, W), COLUMNS pairs a row: real ones left,
    samples right."""
    shown = [_frames(images) for images in (real, sampled)]
    sheets = [_sheet(moment) for moment in zip(*shown, strict=True)]
    write_whole(path, lambda partial: save_animation(partial, sheets, frame_rate, "webp", quality=90))


def _frames(images: Tensor) -> list[list[Image.Image]]:
    """All pictures of each moment; of pictures there is one."""
    clips = images if images.dim() == 5 else images[:, :, None]
    return [cast(list[Image.Image], to_pictures(moment / 127.5 - 1, 1)) for moment in clips.unbind(2)]


def _sheet(columns: tuple[list[Image.Image], ...]) -> Image.Image:
    count = len(columns[0])
    width, height = len(columns) * CELL + 8, CELL + 4
    sheet = Image.new("RGB", (COLUMNS * width, -(-count // COLUMNS) * height), "white")
    for column, pictures in enumerate(columns):
        for i, picture in enumerate(pictures):
            sheet.paste(picture.resize((CELL, CELL)), (i % COLUMNS * width + column * CELL, i // COLUMNS * height))
    return sheet


def save_results(options: Options, results: dict[str, float]) -> None:
    """Write evaluation.json and print it."""
    told = {name: _plain(value) for name, value in dataclasses.asdict(options).items()}
    text = json.dumps({"settings": told, "results": results}, indent=1) + "\n"
    write_whole(options.out / "evaluation.json", lambda path: path.write_text(text))
    for name, value in results.items():
        print(f"{name:34}{value:.4g}")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
