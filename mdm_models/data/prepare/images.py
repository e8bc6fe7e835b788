"""Encoded images: checked by decoding them, and kept as they are where that is possible."""

import io
import math
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mdm_models.data.media import LARGEST_SIDE, BadSample
from mdm_models.pictures import on_white, opened

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what training reads, by Pillow's names
QUALITY = 95  # of the JPEGs that are made here
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF's orientations of pictures that are turned by a quarter, mirrored or not


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is written into a shard; width and height in pixels."""

    suffix: str  # jpg, png or webp
    data: bytes
    width: int  # as it is shown: upright
    height: int


def checked_image(data: bytes, size: int | None = None) -> EncodedImage:
    """Check that an image decodes; shrink its shorter side to `size` if it is longer; on white where that re-encodes
    it.

    The bytes stay the same unless the image is shrunk, moves, or is of a format that training does not read; it is then
    written as a JPEG. Raises BadSample.
    """
    try:
        image = opened(data)
    except UnidentifiedImageError as error:
        raise BadSample("not an image", str(error)) from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf) or (size is None and max(width, height) > LARGEST_SIDE):
        raise BadSample("too large", f"{width}×{height} pixels")
    shrink = size if size is not None and min(width, height) > size else None
    try:
        if shrink is None and image.format in SUFFIXES and not getattr(image, "is_animated", False):
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE:
                width, height = height, width
            return EncodedImage(SUFFIXES[image.format], data, width, height)
        if shrink is not None:
            image.draft("RGB", (2 * shrink, 2 * shrink))  # a JPEG then decodes to the next size above, which is faster
        picture = on_white(ImageOps.exif_transpose(image))
        if shrink is not None:
            scale = shrink / min(picture.size)
            width, height = (max(shrink, round(side * scale)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=QUALITY)
    except Exception as error:  # of a side that no JPEG has, too
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
    return EncodedImage("jpg", file.getvalue(), *picture.size)
