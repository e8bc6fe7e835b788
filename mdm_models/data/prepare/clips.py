"""Encoded clips: checked without decoding all of them, and re-encoded where they are too large or too long."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av

from mdm_models.data.media import BadSample, demuxer_of, open_container

CRF = "18"  # x264's constant rate factor: hardly told from the original
UNKNOWN_RATE = Fraction(24)


@dataclass(frozen=True)
class EncodedClip:
    suffix: str  # mp4, webm or avi
    data: bytes
    width: int
    height: int
    frames: int
    fps: float


def clip_suffix(data: bytes) -> str | None:
    """The suffix of a clip's container by its first bytes; None for what is not a clip."""
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1"):  # pictures in an mp4's container
        return None
    return {"mp4": "mp4", "matroska": "webm", "avi": "avi"}.get(demuxer_of(data))


def checked_clip(data: bytes, size: int | None = None, seconds: float | None = None) -> EncodedClip:
    """A clip that is whole and begins with a picture that decodes.

    Kept as it is unless its shorter side is longer than `size` pixels or it lasts longer than `seconds`: it is then
    encoded again without sound, as H.264 in an mp4. Raises BadSample.
    """
    suffix = clip_suffix(data)
    if suffix is None:
        raise BadSample("not a clip", f"begins with {data[:16]!r}")
    try:
        with open_container(data) as source:
            if not source.streams.video:
                raise BadSample("undecodable", "no video stream")
            stream = source.streams.video[0]
            stream.codec_context.thread_count = 1  # other threads work on other clips
            rate = stream.average_rate or UNKNOWN_RATE
            count, lasts = _packets(source, stream)
            if not count or count < 0.9 * stream.frames:  # an edit list may hide a few
                raise BadSample("truncated", f"{count} of {stream.frames} frames are there")
            width, height = stream.width, stream.height
            shrink = size is not None and min(width, height) > size
            if shrink or (seconds is not None and lasts > seconds):
                return _encoded_again(source, stream, rate, size if shrink else None, seconds)
            next(source.decode(stream))
            return EncodedClip(suffix, data, width, height, count, float(rate))
    except BadSample:
        raise
    except Exception as error:  # a damaged file may have no rate, no size, no first frame
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None


def _packets(source, stream) -> tuple[int, Fraction]:
    """How many frames there are and how many seconds they last; leaves the source at its start."""
    count, last = 0, Fraction(0)
    for packet in source.demux(stream):
        if packet.size:
            count += 1
            if packet.pts is not None:
                start = stream.start_time or 0
                last = max(last, (packet.pts - start + (packet.duration or 0)) * packet.time_base)
    source.seek(stream.start_time or 0, stream=stream)
    return count, last


def _encoded_again(source, stream, rate: Fraction, size: int | None, seconds: float | None) -> EncodedClip:
    scale = size / min(stream.width, stream.height) if size else 1
    width, height = (2 * round(side * scale / 2) for side in (stream.width, stream.height))  # 4:2:0 needs even sides
    small = (
        frame.reformat(width, height, "yuv420p", interpolation="LANCZOS")
        for frame in _until(source.decode(stream), seconds)
    )
    data, count = encode_mp4(small, width, height, rate)
    if not count:
        raise BadSample("undecodable", "no picture")
    return EncodedClip("mp4", data, width, height, count, float(rate))


def _until(frames: Iterable[av.VideoFrame], seconds: float | None) -> Iterator[av.VideoFrame]:
    """The frames before that time, which is counted from the first."""
    first = None
    for frame in frames:
        first = frame.time if first is None else first
        if seconds is not None and frame.time - first >= seconds:
            return
        yield frame


def encode_mp4(frames: Iterable[av.VideoFrame], width: int, height: int, rate: Fraction) -> tuple[bytes, int]:
    """H.264 in an mp4, and how many frames it has. Each is shown for 1/rate seconds."""
    file = io.BytesIO()
    count = 0
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=rate, options={"crf": CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for count, frame in enumerate(frames, start=1):
            frame.pts, frame.time_base = count - 1, 1 / rate
            frame.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses its own key frames
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return file.getvalue(), count
