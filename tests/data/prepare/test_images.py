import io

import numpy as np
import pytest
from PIL import Image

from mdm_models.data.media import BadSample
from mdm_models.data.prepare.images import checked_image
from tests.data.prepare.conftest import encode_image


@pytest.mark.parametrize(("form", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("size", [None, 16, 99])
def test_an_image_that_is_small_enough_keeps_its_bytes(form, suffix, size):
    data = encode_image(form)
    image = checked_image(data, size)
    assert (image.suffix, image.data, image.width, image.height) == (suffix, data, 24, 16)


@pytest.mark.parametrize(("width", "height", "expected"), [(90, 60, (15, 10)), (60, 90, (10, 15)), (61, 61, (10, 10))])
def test_a_larger_image_is_shrunk_to_its_shorter_side(width, height, expected):
    image = checked_image(encode_image(width=width, height=height), 10)
    assert (image.width, image.height) == Image.open(io.BytesIO(image.data)).size == expected


def test_shrinking_averages_rather_than_picks():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))  # each pixel between is grey on average
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, format="PNG")
    shrunk = np.asarray(Image.open(io.BytesIO(checked_image(file.getvalue(), 16).data)))
    assert np.abs(shrunk[2:-2, 2:-2].astype(float) - 127.5).max() < 16


def test_transparency_becomes_white_where_an_image_is_shrunk():
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(file, format="PNG")
    shrunk = np.asarray(Image.open(io.BytesIO(checked_image(file.getvalue(), 10).data)))
    assert shrunk.shape == (10, 10, 3)
    assert shrunk.min() == 255


def test_an_image_on_its_side_is_set_up_before_it_is_shrunk():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = checked_image(encode_image(width=40, height=20, exif=exif), 10)
    assert (image.width, image.height) == (10, 20)


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_that_keeps_its_bytes_has_the_size_at_which_it_is_shown(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    image = checked_image(encode_image(width=40, height=20, exif=exif))
    assert (image.width, image.height) == ((40, 20) if turn < 5 else (20, 40))


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_what_training_does_not_read_becomes_a_jpeg(form):
    image = checked_image(encode_image(form))
    assert image.suffix == "jpg"
    assert Image.open(io.BytesIO(image.data)).format == "JPEG"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_converted_where_an_image_is_shrunk(mode):
    image = checked_image(encode_image(mode=mode, width=64, height=64), 16)
    assert Image.open(io.BytesIO(image.data)).mode == "RGB"


def test_an_image_that_breaks_off_is_refused():
    data = encode_image(width=64, height=64)
    with pytest.raises(BadSample) as failure:
        checked_image(data[: len(data) // 2])
    assert failure.value.reason == "undecodable"


def test_a_web_page_is_not_an_image():
    with pytest.raises(BadSample) as failure:
        checked_image(b"<!DOCTYPE html><html>gone</html>")
    assert failure.value.reason == "not an image"


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 - 1)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadSample) as failure:
        checked_image(encode_image(), 8)
    assert failure.value.reason == "too large"
