"""Sample pictures or clips from a saved model.

  mdm sample mdm_t2i_emoji_64 "red apple, 3d style" "penguin, noto style" --seed 1
  mdm sample MODEL "a penguin" --count 4 --steps 25 --sampler dpmpp_2m --out penguins
  mdm sample MODEL "a penguin in the snow" --image photo.jpg --strength 0.6 --out snow.png
  torchrun --nproc-per-node=8 -m mdm_models.cli sample MODEL --prompts coco-30k.txt --out COCO

--prompts takes a file with a prompt on each line, however long: picture NUMBER.png, from 000000 on, is of line NUMBER
(of NUMBER // count with --count). Processes share the work, and the same command again draws what is missing.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from tyro.conf import Positional, arg

from mdm_models.commands.line import Dtype, check_steps, command, device_of, dtype_of
from mdm_models.data.config import check_above_0
from mdm_models.diffusion.noise import seeded_generators
from mdm_models.errors import one_line
from mdm_models.pictures import CLIP_SUFFIXES, Clip, opened
from mdm_models.pipeline import Pipeline, model_directory
from mdm_models.plain_text import read_lines, stripped
from mdm_models.processes import init_process_group
from mdm_models.storage import begin, fingerprint, write_whole
from mdm_models.training.fetched import on_this_machine

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PICTURE_SUFFIXES = {*PICTURE_FORMATS, *CLIP_SUFFIXES, ".bmp", ".tif", ".tiff", ".avif", ".mov", ".webm", ".mkv", ".avi"}


ELSEWHERE = ("model", "file", "out", "device", "batch_size", "low_memory")  # options that no picture follows from


Pictures = list[Image.Image | Clip]


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """a name of `mdm models --pretrained`, a run, or what `mdm convert` or save_pretrained wrote, or the URL of one"""
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT")] = ()
    """what to show; several give several pictures"""
    file: Annotated[Path | None, arg(name="prompts")] = None
    """a file with a prompt on each line, in place of prompts"""
    out: Path = Path("samples")
    """a folder, or the file of one picture"""
    count: int = 1
    """pictures for each prompt"""
    negative_prompt: Annotated[str | None, arg(aliases=["--negative"])] = None
    """what to steer away from"""
    steps: int | None = None
    """sampling steps; default: the model's"""
    guidance_scale: Annotated[float | None, arg(aliases=["--guidance"])] = None
    """classifier-free guidance; 1 is none; default: the model's"""
    guidance_interval: tuple[float, float] | None = None
    """the times, low and high in 0…1000, that have it; default: all"""
    sampler: str | None = None
    """ddim, ddpm, dpmpp_2m or heun; default: the model's"""
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
    frames: int | None = None
    """of a clip; more than the model's take proportionally longer: windows of its length slide over the clip"""
    text_encoder: str | None = None
    """use this text encoder in place of the one that the model names"""
    format: Literal["png", "jpg", "webp", "mp4", "gif"] | None = None
    """of the files in a folder; default: png for pictures, mp4 for clips"""
    device: str = "auto"
    """auto: a GPU if there is one"""
    dtype: Dtype | None = None
    """to compute in; default: bfloat16 on a GPU; on a CPU the file's, or float32 if it has no units for that"""
    low_memory: bool = False
    """one picture at a time through the network"""
    batch_size: int = 16
    """pictures at once in each process, with --prompts"""

    def __post_init__(self):
        if bool(self.prompts) == bool(self.file):
            raise ValueError("give prompts, one or several, or a file of them by --prompts")
        check_above_0(self, "batch_size", "count")


def sample(options: Options) -> None:
    """Draw what the options ask for and save it. Raises OSError, ValueError or TypeError in one line."""
    check_steps(options.steps)
    options = dataclasses.replace(options, model=on_this_machine(options.model))
    if options.file:
        sample_file(options, options.file)
        return
    device = device_of(options.device)
    image = None if options.image is None else _read(options.image)
    directory = model_directory(options.model)
    pipeline = Pipeline.from_pretrained(
        directory, text_encoder=options.text_encoder, dtype=dtype_of(options.dtype, device), device=device
    )
    paths = _paths(options, pipeline.model.config.is_video)
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
    shown = pipeline(
        list(options.prompts), num_images_per_prompt=options.count, seed=seed, image=image, **_how(options)
    )
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    for path, picture, prompt in zip(paths, cast(Pictures, shown), prompts, strict=True):
        _save(picture, path)
        print(f"{path}: {prompt}")
    print(f"seed {seed}")


def _how(options: Options) -> dict[str, Any]:
    """How pictures are drawn, as a pipeline takes it."""
    return {
        "negative_prompt": options.negative_prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": options.guidance_interval,
        "sampler": options.sampler,
        "eta": options.eta,
        "threshold": options.threshold,
        "strength": options.strength,
        "frames": options.frames,
        "low_memory": options.low_memory,
    }


def sample_file(options: Options, file: Path) -> None:
    """Draw what is missing in the folder of the pictures of a file of prompts; the processes of torchrun share it."""
    with init_process_group(options.device) as processes:
        prompts = _lines(file)
        image = None if options.image is None else _read(options.image)
        dtype = dtype_of(options.dtype, processes.device)
        pipeline = Pipeline.from_pretrained(
            model_directory(options.model), text_encoder=options.text_encoder, dtype=dtype, device=processes.device
        )
        suffix = _suffix(options, pipeline.model.config.is_video)
        settings = {name: str(value) for name, value in vars(options).items() if name not in ELSEWHERE}
        settings |= {"weights": fingerprint(model_directory(options.model))}
        settings |= {"seed": str(options.seed or 0), "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
        processes.agree(lambda: begin(options.out, settings) if processes.is_main else None)
        paths = [options.out / f"{number:06d}.{suffix}" for number in range(len(prompts) * options.count)]
        mine = range(processes.rank, len(paths), processes.world_size)
        missing = [number for number in mine if not paths[number].exists()]
        done, quiet = len(mine) - len(missing), not processes.is_main
        with tqdm(total=len(mine), initial=done, unit=" pictures", dynamic_ncols=True, disable=quiet) as bar:
            for start in range(0, len(missing), options.batch_size):
                numbers = missing[start : start + options.batch_size]
                generators = seeded_generators(options.seed or 0, numbers)
                asked = [prompts[number // options.count] for number in numbers]
                shown = pipeline(asked, generator=generators, image=image, progress=False, **_how(options))
                for number, picture in zip(numbers, cast(Pictures, shown), strict=True):
                    _save(picture, paths[number])
                bar.update(len(numbers))
        processes.any(False)  # all leave together: torchrun ends those that are left
        if processes.is_main:
            print(f"{options.out}: {len(paths)} pictures of {len(prompts)} prompts")


def _lines(path: Path) -> list[str]:
    """Raises ValueError for a file without prompts."""
    try:
        lines = [stripped(line) for line in read_lines(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not text in UTF-8: {error}") from None
    if not lines:
        raise ValueError(f"--prompts {path} is empty; it must have a prompt on each line")
    return lines


def _read(path: Path) -> Image.Image:
    try:
        image = opened(path.read_bytes())
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} is no picture that can be read: {one_line(error)}") from None
    return image


def _paths(options: Options, is_video: bool) -> list[Path]:
    """Where the pictures go, found out before the sampling, which takes long."""
    count = len(options.prompts) * options.count
    suffix = _suffix(options, is_video)
    suffixes, kind = _kind(is_video)
    if options.out.suffix.lower() in PICTURE_SUFFIXES and not options.out.is_dir():
        if options.out.suffix.lower() not in suffixes:
            known = ", *".join(suffixes)
            raise ValueError(f"--out {options.out}: the model makes {kind}; name a folder, or a file *{known}")
        if count > 1:
            raise ValueError(f"--out {options.out} is one file and there will be {count} {kind}; name a folder")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        return [options.out]
    options.out.mkdir(parents=True, exist_ok=True)
    taken = [int(path.stem) for path in options.out.iterdir() if path.stem.isdecimal()]
    first = max(taken, default=-1) + 1  # nothing that is there is overwritten
    return [options.out / f"{first + i:04d}.{suffix}" for i in range(count)]


def _suffix(options: Options, is_video: bool) -> str:
    """Of the files in a folder. Raises ValueError."""
    suffixes, kind = _kind(is_video)
    if options.format and f".{options.format}" not in suffixes:
        raise ValueError(f"--format {options.format}: the model makes {kind}; choose {', '.join(suffixes)}")
    return options.format or ("mp4" if is_video else "png")


def _kind(is_video: bool) -> tuple[Iterable[str], str]:
    """The suffixes of what a model makes, and what it is called."""
    return (CLIP_SUFFIXES, "clips") if is_video else (PICTURE_FORMATS, "pictures")


def _save(picture: Image.Image | Clip, path: Path) -> None:
    if isinstance(picture, Clip):
        picture.save(path)
    else:
        form = PICTURE_FORMATS[path.suffix.lower()]
        write_whole(path, lambda partial: picture.save(partial, format=form, quality=95))


main = command("sample", __doc__, Options, sample, urls=["model"])
