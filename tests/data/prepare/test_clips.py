import io
from pathlib import Path

import av
import pytest

from mdm_models.data.media import BadSample
from mdm_models.data.prepare.clips import checked_clip, clip_suffix
from tests.data.prepare.conftest import encode_image
from tests.made_data import GREY_STEP, encode_clip


@pytest.fixture(scope="module")
def clip() -> bytes:
    """24 frames at 24 fps of 32² pixels."""
    return encode_clip()


def greys(data: bytes) -> list[float]:
    """The mean of each frame."""
    with av.open(io.BytesIO(data)) as container:
        return [float(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]


def test_a_clip_that_is_small_and_short_enough_keeps_its_bytes(clip):
    kept = checked_clip(clip, size=32, seconds=1)
    assert kept.data == clip
    assert (kept.suffix, kept.width, kept.height, kept.frames, kept.fps) == ("mp4", 32, 32, 24, 24)


def test_a_larger_clip_is_shrunk_to_its_shorter_side_and_keeps_its_frames():
    small = checked_clip(encode_clip(width=96, height=64), size=32)
    assert (small.width, small.height, small.frames, small.fps) == (48, 32, 24, 24)
    for t, grey in enumerate(greys(small.data)):
        assert grey == pytest.approx(min(255, GREY_STEP * t), abs=4)


def test_a_longer_clip_is_cut_to_its_first_seconds(clip):
    short = checked_clip(clip, seconds=0.5)
    assert short.frames == len(greys(short.data)) == 12
    assert greys(short.data)[11] == pytest.approx(11 * GREY_STEP, abs=4)


def test_odd_sides_become_even_where_a_clip_is_encoded_again():
    small = checked_clip(encode_clip(width=75, height=50), size=25)
    assert (small.width, small.height) == (38, 24)


def test_a_clip_that_breaks_off_is_refused(clip):
    with pytest.raises(BadSample) as failure:
        checked_clip(clip[: len(clip) // 2])
    assert failure.value.reason == "undecodable"


def test_a_clip_whose_last_pictures_are_missing_is_refused(clip, tmp_path):
    file = str(tmp_path / "index_first.mp4")
    with (
        av.open(io.BytesIO(clip)) as source,
        av.open(file, "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = Path(file).read_bytes()
    assert checked_clip(whole).frames == 24
    with pytest.raises(BadSample) as failure:
        checked_clip(whole[:-400])
    assert failure.value.reason == "truncated"


@pytest.mark.parametrize("data", [b"#EXTM3U\n#EXTINF:1,\nfile:///a.mp4\n", b"<!DOCTYPE html>", b"", encode_image()])
def test_what_is_not_a_clip_is_not_taken_for_one(data):
    assert clip_suffix(data) is None


def test_an_avif_picture_is_not_taken_for_a_clip():
    assert clip_suffix(b"\0\0\0\x1cftypavif") is None
    assert clip_suffix(b"\0\0\0\x1cftypisom") == "mp4"
