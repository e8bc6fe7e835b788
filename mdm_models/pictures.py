"""What was sampled, as people look at it: pictures, and clips that can be saved as mp4, GIF or WebP."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mdm_models.storage import write_whole

CLIP_SUFFIXES = (".mp4", ".gif", ".webp")


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
        if path.suffix not in CLIP_SUFFIXES:
            raise ValueError(f"{path}: a clip is saved as one of {', '.join(CLIP_SUFFIXES)}")
        write_whole(path, self._write_mp4 if path.suffix == ".mp4" else self._write_animation(path.suffix[1:]))

    def _write_mp4(self, path: Path) -> None:
        try:
            import av
        except ImportError:
            raise ValueError("saving an .mp4 needs the package av: pip install av, or save a .gif or .webp") from None
        with av.open(path, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(self.frame_rate).limit_denominator(1001))
            stream.width, stream.height = self.frames[0].size
            stream.pix_fmt = "yuv420p"  # what browsers and phones play
            stream.options = {"crf": "12"}
            for frame in self.frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())

    def _write_animation(self, suffix: str):
        first, *rest = self.frames
        milliseconds = round(1000 / self.frame_rate)

        def write(path: Path) -> None:
            first.save(
                path, format=suffix, save_all=True, append_images=rest, duration=milliseconds, loop=0, quality=95
            )

        return write


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) or clips (B, 3, T, H, W) in −1…1 → uint8 arrays (B, H, W, 3) or (B, T, H, W, 3)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(1, -1).cpu().numpy()


def to_pictures(images: Tensor, frame_rate: float) -> list[Image.Image] | list[Clip]:
    """Images (B, 3, H, W) in −1…1 → B pictures; clips (B, 3, T, H, W) → B clips."""
    pixels = to_pixels(images)
    if images.dim() == 4:
        return [Image.fromarray(picture) for picture in pixels]
    return [Clip([Image.fromarray(frame) for frame in clip], frame_rate) for clip in pixels]


def from_pictures(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures of any size → (B, 3, size, size) in −1…1: their central square, transparency on white."""
    squares = []
    for picture in pictures:
        opaque = on_white(ImageOps.exif_transpose(picture))
        squares.append(np.asarray(ImageOps.fit(opaque, (size, size), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1


def on_white(picture: Image.Image) -> Image.Image:
    """The same in RGB, with white where it is transparent."""
    if not picture.has_transparency_data:  # most are not, and compositing takes longer than decoding a JPEG
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
