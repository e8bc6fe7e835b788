"""Sample pictures or clips from a saved model.

  mdm sample mdm_t2i_emoji_64 "red apple, 3d style" "penguin, noto style" --seed 1
  mdm sample MODEL "a penguin" --count 4 --steps 25 --sampler dpmpp_2m --out penguins
  mdm sample MODEL "a penguin in the snow" --image photo.jpg --strength 0.6 --out snow.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from tyro.conf import Positional, arg

from mdm_models.commands.line import Dtype, check_steps, command, device_of, dtype_of
from mdm_models.errors import one_line
from mdm_models.pictures import CLIP_SUFFIXES, Clip
from mdm_models.pipeline import Pipeline, model_directory
from mdm_models.storage import write_whole

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PICTURE_SUFFIXES = {*PICTURE_FORMATS, *CLIP_SUFFIXES, ".bmp", ".tif", ".tiff", ".avif", ".mov", ".webm", ".mkv", ".avi"}


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """a name of `mdm models --pretrained`, a run, or what `mdm convert` or save_pretrained wrote"""
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT")]
    """what to show; several give several pictures"""
    out: Path = Path("samples")
    """a folder, or the file of one picture"""
    count: int = 1
    """pictures for each prompt"""
    negative_prompt: Annotated[str | None, arg(aliases=["--negative"])] = None
    """what to steer away from"""
    steps: int = 50
    """sampling steps"""
    guidance_scale: Annotated[float | None, arg(aliases=["--guidance"])] = None
    """classifier-free guidance; 1 is none; default: the model's"""
    guidance_interval: tuple[float, float] | None = None
    """the times, low and high in 0…1000, that have it; default: all"""
    sampler: str = "ddim"
    """ddim, ddpm, dpmpp_2m or heun"""
    eta: float = 0.0
    """fresh noise of ddim, 0…1"""
    threshold: Literal["clip", "dynamic", "dynamic_if", "none"] = "clip"
    """how images are held in range"""
    seed: int | None = None
    """picture i depends on it and i alone; default: drawn, and printed"""
    image: Path | None = None
    """begin from this picture"""
    strength: float = 0.8
    """how much of it is given up to noise, 0…1"""
    text_encoder: str | None = None
    """use this text encoder in place of the one that the model names"""
    format: Literal["png", "jpg", "webp", "mp4", "gif"] | None = None
    """of the files in a folder; default: png for pictures, mp4 for clips"""
    device: str = "auto"
    """auto: a GPU if there is one"""
    dtype: Dtype | None = None
    """to compute in; default: bfloat16 on a GPU, float32 elsewhere"""
    low_memory: bool = False
    """one picture at a time through the network"""

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("there is no prompt; give one or several")


def sample(options: Options) -> None:
    """Raises OSError, ValueError or TypeError in one line."""
    check_steps(options.steps)
    device = device_of(options.device)
    image = None if options.image is None else _read(options.image)
    directory = model_directory(options.model)
    pipeline = Pipeline.from_pretrained(
        directory, text_encoder=options.text_encoder, dtype=dtype_of(options.dtype, device), device=device
    )
    paths = _paths(options, pipeline.model.config.is_video)
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
    shown = pipeline(
        list(options.prompts),
        options.negative_prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
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


def _paths(options: Options, is_video: bool) -> list[Path]:
    """Where the pictures go, found out before the sampling, which takes long."""
    count = len(options.prompts) * options.count
    suffixes = CLIP_SUFFIXES if is_video else PICTURE_FORMATS
    kind = "clips" if is_video else "pictures"
    if options.format and f".{options.format}" not in suffixes:
        raise ValueError(f"--format {options.format}: the model makes {kind}; choose {', '.join(suffixes)}")
    if options.out.suffix.lower() in PICTURE_SUFFIXES and not options.out.is_dir():
        if options.out.suffix.lower() not in suffixes:
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
        form = PICTURE_FORMATS[path.suffix.lower()]
        write_whole(path, lambda partial: picture.save(partial, format=form, quality=95))


main = command("sample", __doc__, Options, sample)
