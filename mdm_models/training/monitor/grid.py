"""An animated grid: real clips in the upper row, sampled ones below, their captions underneath."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mdm_models.pictures import save_animation, to_pixels
from mdm_models.storage import write_whole

CELL = 128  # pixels; small clips are magnified to about this
MARGIN = 6
LABEL = 64  # width of the column that names the rows
FONT_SIZE = 12


def save_grid(path: Path, rows: dict[str, Tensor], captions: list[str], frame_rate: float) -> None:
    """Write an animated WebP, a still one if the clips have one frame.

    rows: label → clips (N, 3, T, H, W) in −1…1, one row of the grid; captions: N, one a column.
    """
    pictures = {label: _pictures(clips) for label, clips in rows.items()}
    frames = len(next(iter(pictures.values()))[0])
    sheets = [
        _sheet({label: [clip[t] for clip in clips] for label, clips in pictures.items()}, captions)
        for t in range(frames)
    ]
    write_whole(path, lambda partial: save_animation(partial, sheets, frame_rate, "webp", quality=90))


def _pictures(clips: Tensor) -> list[list[Image.Image]]:
    """(N, 3, T, H, W) → N lists of T pictures."""
    pixels = to_pixels(clips)
    factor = max(1, CELL // pixels.shape[2])
    size = (pixels.shape[3] * factor, pixels.shape[2] * factor)
    return [[Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in clip] for clip in pixels]


def _sheet(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """One frame of the grid."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = next(iter(rows.values()))[0].size
    lines = [_wrap(caption, font, width) for caption in captions]
    text_height = max(map(len, lines)) * (FONT_SIZE + 3)
    sheet = Image.new(
        "RGB",
        (LABEL + len(captions) * (width + MARGIN), MARGIN + len(rows) * (height + MARGIN) + text_height + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for r, (label, pictures) in enumerate(rows.items()):
        top = MARGIN + r * (height + MARGIN)
        draw.text((MARGIN, top + height // 2 - FONT_SIZE // 2), label, "black", font)
        for c, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL + c * (width + MARGIN), top))
    top = MARGIN + len(rows) * (height + MARGIN)
    for c, wrapped in enumerate(lines):
        draw.multiline_text((LABEL + c * (width + MARGIN), top), "\n".join(wrapped), "black", font, spacing=3)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most three lines no wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= 3 else [*lines[:2], lines[2] + " …"]
