"""Clips are read, prepared and saved as their files say that they are to be shown."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mdm_models.data.media import BadSample, decode_clip
from mdm_models.data.prepare.clips import checked_clip
from mdm_models.mp4 import write_mp4
from mdm_models.pictures import Clip
from tests.data.shown import colour, contents
from tests.made_data import encode_frames


def prepared(data: bytes, size: int) -> bytes:
    again = checked_clip(data, size)
    assert again.data != data
    return again.data


def greys(clip: torch.Tensor) -> list[float]:
    return clip.float().mean(dim=(0, 2, 3)).tolist()


@pytest.mark.parametrize("grey", [30, 100, 200])
def test_a_clip_that_is_shrunk_is_as_bright_as_before(grey):
    data = encode_frames([np.full((64, 64, 3), grey, np.uint8)] * 4)
    assert greys(decode_clip(prepared(data, 32), 4, 24, 32)) == pytest.approx([grey] * 4, abs=1)


@pytest.mark.parametrize("form", ["as it is", "prepared"])
@pytest.mark.parametrize(
    ("codec", "pixels", "container_form"),
    [
        ("qtrle", "argb", "mov"),
        ("png", "rgba", "mov"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("libvpx-vp9", "yuva420p", "webm"),
    ],
)
def test_a_transparent_clip_is_shown_on_white(codec, pixels, container_form, form):
    picture = np.full((32, 32, 4), (30, 180, 60, 255), np.uint8)
    picture[:, :16, 3] = 0
    file = io.BytesIO()
    with av.open(file, "w", format=container_form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)
        container.mux([packet for given in (frame, None) for packet in stream.encode(given)])
    data = file.getvalue() if form == "as it is" else prepared(file.getvalue(), 16)
    shown = decode_clip(data, 1, 8, 16)
    assert shown[..., :6].min() >= 250
    assert colour(shown[..., 10:]) == pytest.approx([30, 180, 60], abs=6)


@pytest.mark.parametrize("form", ["as it is", "prepared"])
def test_what_the_two_fields_of_an_interlaced_frame_show_is_not_mixed(form):
    """A white bar that moves 16 pixels a frame; odd lines show it half a frame later."""
    pictures = np.zeros((8, 64, 192, 3), np.uint8)
    for time, picture in enumerate(pictures):
        picture[0::2, 16 * time : 16 * time + 32] = picture[1::2, 16 * time + 8 : 16 * time + 40] = 255
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"flags": "+ildct+ilme", "x264opts": "interlaced=1:tff=1", "crf": "5"}
        stream = container.add_stream("libx264", rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 192, 64, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]
        container.mux([packet for given in (*frames, None) for packet in stream.encode(given)])
    data = file.getvalue() if form == "as it is" else prepared(file.getvalue(), 48)
    shown = decode_clip(data, 4, 8, 64, start=0.8)[0].float()
    assert shown[:, 8:-8].diff(dim=1).abs().mean() < 2  # 20 where both are shown at once


@pytest.mark.parametrize("form", ["as it is", "prepared"])
def test_a_clip_whose_frames_change_their_size_keeps_that_of_the_first(form):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = None
        for time, (grey, side) in enumerate(((50, 64), (200, 96))):
            with av.open(io.BytesIO(encode_frames([np.full((side, side, 3), grey, np.uint8)], 1))) as part:
                stream = stream or container.add_stream_from_template(part.streams.video[0])
                packets = av.BitStreamFilterContext("h264_mp4toannexb", part.streams.video[0])  # with its size inside
                for packet in packets.filter(next(part.demux(part.streams.video[0]))):
                    packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1), time, time
                    container.mux(packet)
    data = file.getvalue() if form == "as it is" else prepared(file.getvalue(), 32)
    assert greys(decode_clip(data, 2, 1, 32)) == pytest.approx([50, 200], abs=3)


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_a_clip_that_begins_late_is_as_long_as_its_frames_last(form):
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        planes = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8)) for i in range(24)]
        for i, plane in enumerate(planes):
            plane.pts, plane.time_base = i + 5, Fraction(1, 8)
        container.mux([packet for plane in [*planes, None] for packet in stream.encode(plane)])
    data = file.getvalue()
    assert greys(decode_clip(data, 8, 8, 32)) == pytest.approx(range(0, 80, 10), abs=3)
    assert greys(decode_clip(data, 8, 8, 32, start=0.999)) == pytest.approx(range(160, 240, 10), abs=3)
    with pytest.raises(BadSample, match="too short"):
        decode_clip(data, 26, 8, 32)
    assert checked_clip(data, seconds=3).data == data


def test_a_prepared_clip_keeps_its_colours():
    data = contents("bt709.mp4")
    for clip in (data, prepared(data, 32)):
        assert colour(decode_clip(clip, 4, 8, 32)) == pytest.approx([30, 180, 60], abs=4)


def test_a_saved_clip_has_the_colours_of_its_pictures(tmp_path):
    Clip([Image.new("RGB", (32, 32), (30, 180, 60))] * 4, 8).save(tmp_path / "a.mp4")
    assert colour(decode_clip((tmp_path / "a.mp4").read_bytes(), 4, 8, 32)) == pytest.approx([30, 180, 60], abs=4)


def test_a_clip_filmed_on_its_side_is_prepared_upright():
    again = checked_clip(contents("turned.mp4"), 48)
    assert (again.width, again.height) == (48, 64)
    for clip in (contents("turned.mp4"), again.data):
        red = decode_clip(clip, 1, 8, 32)[:, 0].float()
        assert red[0, 2:10, -10:-2].mean() > 200  # the quarter at the top right
        assert red[1, 2:10, -10:-2].mean() < 60
        assert red[1, 2:10, 2:10].mean() > 200


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((-1, 0, 0, 1), (0, 1)),  # a mirror image
        ((1, 0, 0, -1), (1, 0)),
        ((-1, 0, 0, -1), (1, 1)),
        ((0, 1, -1, 0), (0, 1)),
        ((0, -1, 1, 0), (1, 0)),
        ((0, 1, 1, 0), (0, 0)),  # mirrored and turned
        ((0, -1, -1, 0), (1, 1)),
    ],
)
def test_every_display_matrix_is_obeyed(matrix, corner):
    """(a, b, c, d) of ISO 14496-12: (x, y) → (ax + cy, bx + dy), y down; what was at the top left is at `corner`."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16] = 255
    data = encode_frames([picture] * 4)
    track = data.index(b"tkhd")
    fields = [struct.pack(">5i", *(entry << 16 for entry in (a, b, 0, c, d))) for a, b, c, d in ((1, 0, 0, 1), matrix)]
    shown = decode_clip(data[:track] + data[track:].replace(*fields, 1), 1, 24, 16)[0, 0]
    quarters = shown.unflatten(0, (2, 8)).unflatten(2, (2, 8))[:, 2:6, :, 2:6].float().mean(dim=(1, 3))
    assert quarters[corner] > 200
    assert quarters.sum() - quarters[corner] < 100


def test_frames_at_changing_distances_keep_their_times():
    expected = [20, 37, 55, 72, 90, 107, 125, 142, 160, 177, 195, 212]
    data = contents("phone.mp4")
    for clip in (data, prepared(data, 32)):
        assert greys(decode_clip(clip, 12, 4, 32)) == pytest.approx(expected, abs=8)


def uneven_with_b_frames() -> bytes:
    """An mp4 of frame t grey of 10 · t at uneven distances, by an encoder that puts B-frames between others."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, millisecond in enumerate([0, 40, 80, 500, 540, 580, 1000, 1040, 1500, 1600]):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = millisecond, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_uneven_frames_behind_b_frames_are_shown_to_the_last():
    data = uneven_with_b_frames()
    assert greys(decode_clip(data, 3, 2, 32, start=0.999)) == pytest.approx([50, 70, 80], abs=2)
    assert greys(decode_clip(data, 3, 1.4, 32)) == pytest.approx([0, 50, 70], abs=2)  # 1.43 s, of 1.64


def test_uneven_frames_behind_b_frames_are_shown_no_longer_than_their_edit_list():
    data = bytearray(uneven_with_b_frames())
    struct.pack_into(">I", data, data.index(b"elst") + 12, 1200)  # milliseconds of its one entry
    assert max(greys(decode_clip(bytes(data), 3, 2, 32, start=0.999))) < 75


@pytest.mark.parametrize("form", ["as it is", "prepared"])
def test_pixels_twice_as_wide_as_high_are_shown_so(form):
    data = contents("anamorphic.mp4")
    clip = data if form == "as it is" else prepared(data, 32)
    green = decode_clip(clip, 1, 8, 32)[1, 0].float()  # a red disc on white
    disc = green < 128
    assert abs(int(disc.any(dim=0).sum()) - 24) <= 2
    assert abs(int(disc.any(dim=1).sum()) - 24) <= 2


def made(*frames: tuple[int, float, float]) -> bytes:
    """Planes of (grey, second, duration)."""
    file = io.BytesIO()
    planes = ((np.full((32, 32, 3), grey, np.uint8), Fraction(time), Fraction(lasts)) for grey, time, lasts in frames)
    write_mp4(file, planes, (32, 32), Fraction(1), crf=10)
    return file.getvalue()


def test_a_last_frame_is_shown_as_long_as_it_lasts():
    data = contents("held.mp4")
    for clip in (data, prepared(data, 16)):
        assert greys(decode_clip(clip, 4, 1, 16)) == pytest.approx([20, 100, 100, 100], abs=3)


def test_a_first_frame_is_shown_as_long_as_it_lasts():
    assert greys(decode_clip(made((20, 0, 3), (100, 3, 1)), 4, 1, 16)) == pytest.approx([20, 20, 20, 100], abs=3)


def test_a_clip_cut_inside_a_frame_that_lasts_ends_there():
    short = checked_clip(made((20, 0, 1), (100, 1, 3)), seconds=2)
    with av.open(io.BytesIO(short.data)) as container:
        assert container.duration == 2_000_000


def recorded(*frames: tuple[int, int], form: str) -> bytes:
    """Planes of (grey, second), none of which says how long it is shown, and four seconds of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        pictures = container.add_stream({"webm": "libvpx-vp9", "matroska": "libx264"}[form], rate=1)
        pictures.width = pictures.height = 32
        sounds = container.add_stream("libopus", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4 * 48000), np.int16), "s16", "mono")
        silence.sample_rate = 48000
        planes = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8)) for grey, _ in frames]
        for plane, (_, second) in zip(planes, frames, strict=True):
            plane.pts, plane.time_base = second, Fraction(1)
        packets = [packet for plane in [*planes, None] for packet in pictures.encode(plane)]
        for packet in packets:
            packet.duration = 0
        container.mux([*packets, *sounds.encode(silence), *sounds.encode()])
    return file.getvalue()


@pytest.mark.parametrize("form", ["webm", "matroska"])
def test_a_last_frame_that_does_not_say_how_long_it_lasts_is_shown_to_the_end(form):
    data = recorded((20, 0), (100, 1), form=form)
    for clip in (data, prepared(data, 16)):
        assert greys(decode_clip(clip, 4, 1, 16)) == pytest.approx([20, 100, 100, 100], abs=3)
    assert checked_clip(data, seconds=3).data != data


@pytest.mark.parametrize("form", ["webm", "matroska"])
def test_a_recording_that_was_cut_off_is_not_shown_to_the_end_that_it_lacks(form):
    data = recorded(*((10 * second, second) for second in range(16)), form=form)
    assert greys(decode_clip(data, 16, 1, 16)) == pytest.approx(range(0, 160, 10), abs=3)
    with pytest.raises(BadSample, match="of 16 frames could be decoded"):
        decode_clip(data[: len(data) * 4 // 5], 16, 1, 16)


def test_a_recording_without_a_duration_is_read():
    expected = [20, 35, 50, 65, 80, 95, 110, 125]
    data = contents("live.webm")
    assert greys(decode_clip(data, 8, 8, 32)) == pytest.approx(expected, abs=3)
    assert greys(decode_clip(data, 8, 8, 32, start=0.999)) == pytest.approx([e + 120 for e in expected], abs=3)
    assert greys(decode_clip(prepared(data, 16), 8, 8, 16)) == pytest.approx(expected, abs=3)


# Animations


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize(("rate", "seconds"), [(8, 1.0), (24, 8 / 24), (30, 8 / 30)])
def test_a_saved_animation_lasts_as_long_as_its_clip(suffix, rate, seconds, tmp_path):
    Clip([Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(8)], rate).save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as animation:
        durations = []
        for i in range(animation.n_frames):
            animation.seek(i)
            animation.load()
            durations.append(animation.info["duration"])
    assert sum(durations) / 1000 == pytest.approx(seconds, abs=0.01)
    assert max(durations) - min(durations) <= 10
