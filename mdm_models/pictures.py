"""What was sampled, as people look at it: pictures, and clips that can be saved as mp4, GIF or WebP."""

import functools
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from mdm_models.mp4 import evenly, write_mp4
from mdm_models.storage import write_whole

CLIP_SUFFIXES = (".mp4", ".gif", ".webp")
HEIC = (b"ftyphei", b"ftyphev", b"ftypmif")  # how its files go on behind their first four bytes


@dataclass(frozen=True)
class Clip:
    """The frames of a video, and how many are shown a second."""

    frames: list[Image.Image]
    frame_rate: float

    def save(self, path: str | Path) -> None:
        """Write an .mp4 (needs the package av), or an endless .gif or .webp.

        Raises ValueError for another suffix or if av is missing, OSError if it cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in CLIP_SUFFIXES:
            raise ValueError(f"{path}: a clip is saved as one of {', '.join(CLIP_SUFFIXES)}")
        write_whole(path, self._write_mp4 if suffix == ".mp4" else self._write_animation(suffix[1:]))

    def _write_mp4(self, path: Path) -> None:
        rate = Fraction(self.frame_rate).limit_denominator(1001)
        write_mp4(path, evenly(map(np.asarray, self.frames), rate), self.frames[0].size, rate, crf=12)

    def _write_animation(self, suffix: str):
        return lambda path: save_animation(path, self.frames, self.frame_rate, suffix, quality=95)


def save_animation(
    path: Path | BinaryIO, frames: Sequence[Image.Image], frame_rate: float, form: str, **options
) -> None:
    """Write an endless GIF or WebP whose frames last as long together as they are to, to the nearest unit of the form:
    each ends at the whole unit next to its time. options: further ones of Pillow's."""
    unit = {"gif": 10, "webp": 1}[form]  # milliseconds
    ends = [unit * round(1000 * i / frame_rate / unit) for i in range(len(frames) + 1)]
    durations = [end - begin for begin, end in itertools.pairwise(ends)]
    first, *rest = frames
    first.save(path, format=form, save_all=True, append_images=rest, duration=durations, loop=0, **options)


def to_pixels(images: Tensor) -> np.ndarray:
    """Turn images (B, 3, H, W) or clips (B, 3, T, H, W) in −1…1 into uint8 arrays (B, H, W, 3) or (B, T, H, W, 3)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(1, -1).cpu().numpy()


def to_pictures(images: Tensor, frame_rate: float) -> list[Image.Image] | list[Clip]:
    """Turn images (B, 3, H, W) in −1…1 into B pictures, clips (B, 3, T, H, W) into B clips."""
    pixels = to_pixels(images)
    if images.dim() == 4:
        return [Image.fromarray(picture) for picture in pixels]
    return [Clip([Image.fromarray(frame) for frame in clip], frame_rate) for clip in pixels]


def from_pictures(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Turn pictures of any size into (B, 3, size, size) in −1…1: their central square, transparency on white."""
    squares = []
    for picture in pictures:
        opaque = on_white(ImageOps.exif_transpose(picture))
        squares.append(np.asarray(ImageOps.fit(opaque, (size, size), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1


def opened(data: bytes) -> Image.Image:
    """Open an encoded picture. Raises UnidentifiedImageError for what is none, and what Pillow raises for a damaged
    one."""
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        kind = "HEIC, for which there is no decoder" if data[4:11] in HEIC else "not an image"
        raise UnidentifiedImageError(f"{kind}: begins with {data[:16]!r}") from None
    if picture.format == "EPS":
        raise UnidentifiedImageError("an EPS file, a program that Pillow would have Ghostscript run")
    transparent = picture.info.get("transparency")
    if picture.format == "PNG" and transparent is not None:  # which Pillow leaves in the units of the file
        depth = data[24]  # bits, of the header
        if picture.mode == "L" and depth < 8:
            picture.info["transparency"] = transparent * 255 // (2**depth - 1)
        if picture.mode == "RGB" and depth == 16:
            picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    return picture


def is_plain(picture: Image.Image) -> bool:
    """Whether a picture is what `on_white` would make of it, as most are."""
    return picture.mode == "RGB" and not picture.has_transparency_data and "icc_profile" not in picture.info


def on_white(picture: Image.Image) -> Image.Image:
    """Give a picture in sRGB, with white where it is transparent; of more than 8 bits the highest count."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
    elif picture.mode not in ("L", "CMYK"):  # which have profiles of their own
        picture = picture.convert("RGB")
    conversion = _to_srgb(profile, picture.mode) if profile else None
    if conversion:
        picture = ImageCms.applyTransform(picture, conversion) or picture
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts pictures of that mode whose colours are those of an ICC profile, as phones and scanners write them;
    None if there is nothing to convert, or the profile is damaged or one of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target)
    except (OSError, ImageCms.PyCMSError):
        return None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of real numbers in 8, which Pillow's own conversion takes to be 0…255 and cuts off.

    White is the largest number of 16 bits where the file says so (I;16, and the modes I of PNG and PGM), or else the
    first of 1 (real numbers), 255, 65535 and 2³¹ − 1 that no pixel passes. What is no number is black.
    """
    grey = np.asarray(picture).astype(np.float64)
    whites = [1.0] * (picture.mode == "F") + [255.0, 65535.0]
    if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):
        whites = [65535.0]
    brightest = grey.max(initial=0, where=np.isfinite(grey))
    white = next((white for white in whites if brightest <= white), 2.0**31 - 1)
    grey = np.nan_to_num(grey, posinf=white, neginf=0)
    shown = Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):  # the grey that is
        shown.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return shown
