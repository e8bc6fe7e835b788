import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mdm_models.data.media import BadSample, Cut, decode_clip, decode_image
from tests.made_data import GREY_STEP, encode_clip, encode_frames, encode_image


def frames_of(clip: torch.Tensor) -> list[int]:
    """Which frame of the made clip each frame is, by its grey."""
    return [round(grey / GREY_STEP) for grey in clip.float().mean(dim=(0, 2, 3)).tolist()]


def test_frames_are_taken_at_the_wanted_rate(clip):
    decoded = decode_clip(clip, frames=4, frame_rate=8, size=16)
    assert decoded.shape == (3, 4, 16, 16)
    assert decoded.dtype == torch.uint8
    assert frames_of(decoded) == [0, 3, 6, 9]


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.5, 7), (0.999, 14)])
def test_the_start_lies_anywhere_the_clip_still_fits(clip, start, first):
    assert frames_of(decode_clip(clip, 4, 8, 16, start)) == [first, first + 3, first + 6, first + 9]


def test_a_slow_clip_repeats_frames():
    assert frames_of(decode_clip(encode_clip(frames=6, fps=4), 6, 8, 16)) == [0, 0, 1, 1, 2, 2]


def test_a_rate_between_frames_takes_the_nearest_earlier_or_equal(clip):
    assert frames_of(decode_clip(clip, 4, 10, 16)) == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("matrix", "white", "black"),
    [
        ((0, 1, -1, 0), np.s_[..., 10:], np.s_[..., :6]),  # a quarter clockwise, as phones write it
        ((0, -1, 1, 0), np.s_[..., :6], np.s_[..., 10:]),
        ((-1, 0, 0, -1), np.s_[..., 10:, :], np.s_[..., :6, :]),
    ],
)
def test_a_clip_filmed_on_its_side_is_turned_upright(matrix, white, black):
    """A white top half, under the display matrix (a, b, c, d) of ISO 14496-12: (x, y) → (ax + cy, bx + dy), y down."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16] = 255
    data = encode_frames([picture] * 4)
    track = data.index(b"tkhd")  # the movie's own header, before it, has a matrix too
    decoded = decode_clip(data[:track] + data[track:].replace(_matrix(1, 0, 0, 1), _matrix(*matrix), 1), 2, 24, 16)
    assert decoded[white].min() > 200
    assert decoded[black].max() < 50


def _matrix(a: int, b: int, c: int, d: int) -> bytes:
    return struct.pack(">5i", *(entry << 16 for entry in (a, b, 0, c, d)))


def test_one_frame_of_a_clip_is_an_image(clip):
    assert decode_clip(clip, 1, 8, 16).shape == (3, 1, 16, 16)


def test_a_wide_clip_is_cropped_to_its_centre():
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = 255
    assert decode_image(encode_image(picture), 16).min() == 255


@pytest.mark.parametrize(("place", "white"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.999, 4)])
@pytest.mark.parametrize("tall", [False, True])
def test_a_cut_may_lie_anywhere_along_the_long_side(place, white, tall):
    """Five squares of 16 pixels in a row, of which one is white."""
    picture = np.zeros((16, 80, 3), np.uint8)
    picture[:, 16 * white : 16 * white + 16] = 255
    decoded = decode_image(encode_image(picture.transpose(1, 0, 2) if tall else picture), 16, Cut(place))
    assert decoded.float().mean() > 200


def test_a_mirrored_cut_is_the_cut_from_right_to_left():
    picture = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    plain, mirrored = (decode_image(encode_image(picture), 16, Cut(0.3, mirror)) for mirror in (False, True))
    assert torch.equal(mirrored, plain.flip(3))
    assert not torch.equal(mirrored, plain)


def test_all_frames_of_a_clip_are_cut_alike():
    clip = encode_clip(frames=10, width=96, height=32)
    plain, mirrored = (decode_clip(clip, 4, 8, 16, 0.0, Cut(0.9, mirror)) for mirror in (False, True))
    assert torch.equal(mirrored, plain.flip(3))
    assert frames_of(plain) == [0, 3, 6, 9]


def test_a_photograph_is_turned_upright():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = 255  # the left half; orientation 6 says: turn by 90° clockwise to look at it
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encode_image(picture, "jpeg", exif=exif), 16)
    assert decoded[..., :7, :].min() > 200
    assert decoded[..., 9:, :].max() < 50


def test_halving_averages_pixels():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, ::2] = 200
    middle = decode_image(encode_image(picture), 16)[..., 2:-2].float()
    torch.testing.assert_close(middle, torch.full_like(middle, 100.0), rtol=0, atol=1)


def test_transparency_is_white():
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, :8, 3] = 255
    decoded = decode_image(encode_image(picture, "webp"), 16)
    assert decoded[..., :7].max() <= 2
    assert decoded[..., 9:].min() >= 253


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda clip: b"no clip at all", "undecodable"),
        (lambda clip: clip[: len(clip) // 2], "undecodable"),
        (lambda clip: b"", "undecodable"),
        (lambda clip: encode_clip(frames=9), "too short"),
        (lambda clip: encode_clip(width=64, height=16), "too small"),
    ],
)
def test_a_bad_clip_says_why(clip, make, reason):
    with pytest.raises(BadSample) as bad:
        decode_clip(make(clip), frames=4, frame_rate=8, size=40)
    assert bad.value.reason == reason


def test_a_playlist_is_not_followed(clip, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n"
    with pytest.raises(BadSample) as bad:
        decode_clip(playlist.encode(), frames=4, frame_rate=8, size=16)
    assert "not an mp4" in bad.value.detail


def test_ten_frames_are_just_enough(clip):
    assert frames_of(decode_clip(encode_clip(frames=10), 4, 8, 16)) == [0, 3, 6, 9]


def test_a_clip_that_ends_before_its_header_says_is_undecodable(clip):
    """The index of an mp4 may stand in front: cutting the end then leaves it intact."""
    late = clip[: clip.index(b"mdat") + 100] + bytes(len(clip) - clip.index(b"mdat") - 100)
    with pytest.raises(BadSample, match="undecodable"):
        decode_clip(late, 4, 8, 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "undecodable"),
        (encode_image(np.zeros((64, 64, 3), np.uint8))[:60], "undecodable"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "undecodable"),
        (encode_image(np.zeros((4, 64, 3), np.uint8)), "too small"),
        (encode_image(np.zeros((10, 9000, 3), np.uint8)), "too large"),
    ],
    ids=["no image", "cut off", "zeros", "low", "long"],
)
def test_a_bad_image_says_why(data, reason):
    with pytest.raises(BadSample) as bad:
        decode_image(data, 16)
    assert bad.value.reason == reason


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<html><body>404", r"^UnidentifiedImageError: not an image: begins with b'<html><body>404'$"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, for which there is no decoder: begins with"),
        (encode_image(np.zeros((16, 16, 3), np.uint8), "eps"), "an EPS file, a program"),
    ],
    ids=["a web page", "HEIC", "EPS"],
)
def test_what_is_not_read_as_an_image_is_named(data, said):
    with pytest.raises(BadSample, match="undecodable") as bad:
        decode_image(data, 16)
    assert re.search(said, bad.value.detail)
