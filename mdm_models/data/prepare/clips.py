"""Encoded clips: checked without decoding all of them, and re-encoded where they are too large or too long."""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from mdm_models.data.matroska import shown_until
from mdm_models.data.media import (
    BadSample,
    Timed,
    as_shown,
    decoded,
    demuxer_of,
    measure,
    open_container,
    rate_of,
    shown_size,
    start_of,
    timed,
)
from mdm_models.mp4 import write_mp4

CRF = 18  # x264's constant rate factor: hardly told from the original


@dataclass(frozen=True)
class EncodedClip:
    """A clip as it is written into a shard; width and height in pixels, fps in frames a second."""

    suffix: str  # mp4, webm or avi
    data: bytes
    width: int  # as it is shown: upright, in square pixels
    height: int
    frames: int
    fps: float


def clip_suffix(data: bytes) -> str | None:
    """The suffix of a clip's container by its first bytes; None for what is not a clip."""
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1"):  # pictures in an mp4's container
        return None
    return {"mp4": "mp4", "matroska": "webm", "avi": "avi"}.get(demuxer_of(data) or "")


def checked_clip(data: bytes, size: int | None = None, seconds: float | None = None) -> EncodedClip:
    """Check that a clip is whole and begins with a picture that decodes.

    It is kept as it is unless its shorter side is longer than `size` pixels or it lasts longer than `seconds`: it is
    then encoded again without sound, as H.264 in an mp4, upright and in square pixels. Raises BadSample.
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
            rate = rate_of(stream)
            until = shown_until(source, data)
            count, lasts = measure(source, stream)
            if not count or count < 0.9 * stream.frames:  # an edit list may hide a few
                raise BadSample("truncated", f"{count} of {stream.frames} frames are there")
            shrink = size is not None and min(shown_size(stream)) > size
            if shrink or (seconds is not None and max(lasts, until - start_of(stream)) > seconds):
                return _encoded_again(source, stream, rate, until, size if shrink else None, seconds)
            height, width = as_shown(next(decoded(source, stream)), shown_size(stream)).shape[:2]
            return EncodedClip(suffix, data, width, height, count, float(rate))
    except BadSample:
        raise
    except Exception as error:  # a damaged file may have no rate, no size, no first frame
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None


def _encoded_again(
    source, stream, rate: Fraction, until: Fraction, size: int | None, seconds: float | None
) -> EncodedClip:
    """In square pixels, upright, and with the times that its frames had."""
    shown = shown_size(stream)
    scale = size / min(shown) if size else 1
    narrow, low = (2 * max(1, round(side * scale / 2)) for side in shown)  # 4:2:0 needs even sides
    cut = _cut(timed(decoded(source, stream), rate, until), seconds)
    frames = ((as_shown(frame, (narrow, low)), time, lasts) for frame, time, lasts in cut)
    first = next(frames, None)
    if first is None:
        raise BadSample("undecodable", "no picture")
    height, width = first[0].shape[:2]
    file = io.BytesIO()
    count = write_mp4(file, itertools.chain([first], frames), (width, height), rate, CRF)
    return EncodedClip("mp4", file.getvalue(), width, height, count, float(rate))


def _cut(frames: Iterable[Timed], seconds: float | None) -> Iterator[Timed]:
    """The frames of the first seconds; times are counted from the first."""
    end = None if seconds is None else Fraction(seconds)
    first = None
    for frame, time, lasts in frames:
        first = time if first is None else first
        left = lasts if end is None else end - (time - first)
        if left <= 0 and end is not None:
            return
        yield frame, time - first, min(lasts, left)
