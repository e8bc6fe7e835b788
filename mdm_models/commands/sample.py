"""Sample pictures or clips from a saved model.

  mdm sample MODEL_DIR "a penguin" "a red apple" --seed 1
  mdm sample MODEL_DIR "a penguin" --count 4 --steps 25 --sampler dpmpp_2m --out penguins
  mdm sample MODEL_DIR "a penguin in the snow" --image photo.jpg --strength 0.6 --out snow.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mdm_models.diffusion.samplers import SAMPLERS
from mdm_models.diffusion.thresholding import BOUNDS
from mdm_models.errors import one_line
from mdm_models.pictures import CLIP_SUFFIXES, Clip
from mdm_models.pipeline import Pipeline, model_directory
from mdm_models.storage import write_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        _sample(options)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mdm sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", type=Path, help="a run, or what convert or save_pretrained wrote")
    add("prompts", metavar="PROMPT", nargs="+", help="what to show; several give several pictures")
    add("--out", type=Path, default=Path("samples"), help="a folder, or the file of one picture (default: samples)")
    add("--count", type=int, default=1, help="pictures for each prompt (default: 1)")
    add("--negative", metavar="PROMPT", help="what to steer away from")
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the model's)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the times, 0…1000, that have it")
    add("--sampler", default="ddim", help=f"{', '.join(SAMPLERS)} (default: ddim)")
    add("--eta", type=float, default=0.0, help="fresh noise of ddim, 0…1 (default: 0)")
    rules = ("clip", *BOUNDS, "none")
    add("--threshold", choices=rules, default="clip", help="how images are held in range (default: clip)")
    add("--seed", type=int, help="picture i depends on it and i alone (default: drawn, and printed)")
    add("--image", type=Path, help="begin from this picture")
    add("--strength", type=float, default=0.8, help="how much of it is given up to noise, 0…1 (default: 0.8)")
    add("--text-encoder", metavar="PATH", help="use this text encoder in place of the one that the model names")
    add("--format", choices=[suffix[1:] for suffix in (*PICTURE_FORMATS, *CLIP_SUFFIXES) if suffix != ".jpeg"],
        help="of the files in a folder (default: png for pictures, mp4 for clips)")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="to compute in (default: bfloat16 on a GPU, float32 elsewhere)")
    add("--low-memory", action="store_true", help="one picture at a time through the network")
    return parser.parse_args(arguments)


def _sample(options: argparse.Namespace) -> None:
    dtype = DTYPES[options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")]
    image = None if options.image is None else _read(options.image)
    directory = model_directory(options.model)
    pipeline = Pipeline.from_pretrained(
        directory, text_encoder=options.text_encoder, dtype=dtype, device=options.device
    )
    paths = _paths(options, pipeline.model.config.is_video)
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
    shown = pipeline(
        options.prompts,
        options.negative,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        guidance_interval=options.guidance_interval and tuple(options.guidance_interval),
        num_images_per_prompt=options.count,
        sampler=options.sampler,
        eta=options.eta,
        threshold=options.threshold,
        seed=seed,
        image=image,
        strength=options.strength,
        low_memory=options.low_memory,
    )
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    for path, picture, prompt in zip(paths, shown, prompts, strict=True):
        _save(picture, path)
        print(f"{path}: {prompt}")
    print(f"seed {seed}")


def _read(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} is no picture that can be read: {one_line(error)}") from None
    return image


def _paths(options: argparse.Namespace, is_video: bool) -> list[Path]:
    """Where the pictures go, found out before the sampling, which takes long."""
    count = len(options.prompts) * options.count
    suffixes = CLIP_SUFFIXES if is_video else PICTURE_FORMATS
    kind = "clips" if is_video else "pictures"
    if options.format and f".{options.format}" not in suffixes:
        raise ValueError(f"--format {options.format}: the model makes {kind}; choose {', '.join(suffixes)}")
    if options.out.suffix:
        if options.out.suffix not in suffixes:
            known = ", *".join(suffixes)
            raise ValueError(f"--out {options.out}: the model makes {kind}; name a folder, or a file *{known}")
        if count > 1:
            raise ValueError(f"--out {options.out} is one file and there will be {count} {kind}; name a folder")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        return [options.out]
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = options.format or ("mp4" if is_video else "png")
    taken = [int(path.stem) for path in options.out.iterdir() if path.stem.isdecimal()]
    first = max(taken, default=-1) + 1  # nothing that is there is overwritten
    return [options.out / f"{first + i:04d}.{suffix}" for i in range(count)]


def _save(picture: Image.Image | Clip, path: Path) -> None:
    if isinstance(picture, Clip):
        picture.save(path)
    else:
        write_whole(path, lambda partial: picture.save(partial, format=PICTURE_FORMATS[path.suffix], quality=95))


if __name__ == "__main__":
    sys.exit(main())
