"""Pictures are read and prepared as their files say that they are to be shown."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mdm_models.data.media import decode_image
from mdm_models.data.prepare.images import checked_image
from mdm_models.pictures import from_pictures
from tests.data.shown import colour, contents
from tests.made_data import encode_image

# Grey of more than 8 bits


@pytest.mark.parametrize("name", ["gray.png", "gray.tif"])
def test_grey_of_16_bits_is_not_white(name):
    data = contents(name)  # 20000 of 65535
    assert (decode_image(data, 32).int() - 78).abs().max() <= 1
    kept = checked_image(data, 32).data
    assert (decode_image(kept, 32).int() - 78).abs().max() <= 1
    start = from_pictures([Image.open(io.BytesIO(data))], 32)
    assert ((start + 1) * 127.5 - 78).abs().max() <= 1


@pytest.mark.parametrize(
    ("mode", "form", "value"),
    [
        ("I;16", "png", 20000),
        ("I", "tiff", 20000),
        ("I", "ppm", 20000),
        ("I;16B", "tiff", 20000),
        ("F", "tiff", 20000.0),
        ("F", "tiff", 20000 / 65535),
        ("I", "tiff", 78),
        ("F", "tiff", 78.0),
        ("I", "tiff", 20000 << 15),
    ],
)
def test_grey_of_any_depth_has_its_brightness(mode, form, value):
    file = io.BytesIO()
    Image.new(mode, (16, 16), value).save(file, format=form)
    assert (decode_image(file.getvalue(), 16).int() - 78).abs().max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark():
    file = io.BytesIO()
    Image.new("I;16", (16, 16), 200).save(file, format="png")  # of 65535
    assert decode_image(file.getvalue(), 16).max() <= 1


def test_the_transparent_grey_of_16_bits_is_white():
    grey = np.full((16, 16), 20000, np.uint16)
    grey[:, :8] = 300
    file = io.BytesIO()
    Image.fromarray(grey).save(file, format="png", transparency=300)
    decoded = decode_image(file.getvalue(), 16)
    assert decoded[..., :7].min() == 255
    assert (decoded[..., 9:].int() - 78).abs().max() <= 1


def png(depth: int, colours: int, pixel: bytes, transparent: tuple[int, ...]) -> bytes:
    """A PNG of 16² pixels as Pillow does not write them. pixel: a row's bytes, repeated to its length."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    length = 16 * depth * (3 if colours == 2 else 1) // 8
    row = b"\0" + (pixel * length)[:length]
    header = struct.pack(">IIBBBBB", 16, 16, depth, colours, 0, 0, 0)
    see_through = struct.pack(f">{len(transparent)}H", *transparent)
    parts = [(b"IHDR", header), (b"tRNS", see_through), (b"IDAT", zlib.compress(row * 16)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "colours", "pixel", "transparent", "shown"),
    [
        (1, 0, b"\xff", (1,), 255),
        (2, 0, b"\x55", (1,), 255),
        (2, 0, b"\x55", (2,), 85),
        (4, 0, b"\x33", (3,), 255),
        (4, 0, b"\x33", (4,), 51),
        (8, 0, b"\x07", (7,), 255),
        (16, 0, b"\x20\x20", (0x2020,), 255),
        (8, 2, b"\x07", (7, 7, 7), 255),
        (16, 2, b"\x20\x20", (0x2020, 0x2020, 0x2020), 255),
        (16, 2, b"\x20\x20", (0x2020, 0x2020, 0x2120), 0x20),
    ],
)
def test_the_colour_that_is_transparent_is_white_at_any_depth(depth, colours, pixel, transparent, shown):
    data = png(depth, colours, pixel, transparent)
    assert (decode_image(data, 16) == shown).all()
    assert (decode_image(checked_image(data, 8).data, 8).int() - shown).abs().max() <= 1


@pytest.mark.parametrize(("odd", "shown"), [(np.nan, 0), (np.inf, 255), (-np.inf, 0)])
def test_a_pixel_that_is_no_number_leaves_the_others_as_bright_as_they_are(odd, shown):
    grey = np.full((16, 16), 20000 / 65535, np.float32)
    grey[0, 0] = odd
    file = io.BytesIO()
    Image.fromarray(grey).save(file, format="tiff")
    decoded = decode_image(file.getvalue(), 16)[0, 0]
    assert decoded[0, 0] == shown
    assert (decoded.flatten()[1:].int() - 78).abs().max() <= 1


# Colours


def profile_with_red_and_blue_swapped() -> bytes:
    """sRGB's, but for the names of two of its colours and its own."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"none"), (b"bXYZ", b"rXYZ"), (b"none", b"bXYZ")):
        profile = profile.replace(old, new)
    return profile.replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "png"), ("RGB", "webp"), ("RGB", "tiff"), ("P", "png"), ("RGBA", "png")]
)
def test_colours_are_those_of_the_profile_in_the_file(mode, form):
    picture = Image.new("RGB", (32, 32), (40, 80, 200)).convert(mode)
    file = io.BytesIO()
    picture.save(file, format=form, icc_profile=profile_with_red_and_blue_swapped(), lossless=True)
    data = file.getvalue()
    for file in (data, checked_image(data).data, checked_image(data, 16).data):
        assert colour(decode_image(file, 16)) == pytest.approx([200, 80, 40], abs=2)
    start = from_pictures([Image.open(io.BytesIO(data))], 16)
    assert ((start[0].mean(dim=(1, 2)) + 1) * 127.5).tolist() == pytest.approx([200, 80, 40], abs=2)


def test_transparency_is_white_in_colours_of_any_profile():
    picture = Image.new("RGBA", (16, 16), (40, 80, 200, 0))
    file = io.BytesIO()
    picture.save(file, format="png", icc_profile=profile_with_red_and_blue_swapped())
    assert decode_image(file.getvalue(), 16).min() == 255


@pytest.mark.parametrize("profile", [b"none", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_is_damaged_or_of_another_mode_changes_nothing(profile):
    data = encode_image(np.full((16, 16, 3), (200, 80, 40), np.uint8), icc_profile=profile)
    assert colour(decode_image(data, 16)) == [200, 80, 40]
