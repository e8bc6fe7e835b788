"""Encoded clips and images → uint8 tensors of one size."""

import contextlib
import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps
from torch import Tensor

from mdm_models.data.matroska import shown_until
from mdm_models.pictures import is_plain, on_white, opened

UNKNOWN_RATE = Fraction(24)  # of frames, where a file does not say
LARGEST_SIDE = 8192  # pixels; beyond it a file is taken for a decompression bomb
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that show it, by the names of those that do not
SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT  # others darken plain grey


class BadSample(Exception):
    """A sample that cannot be used: `reason` is what it is counted under, `detail` says more of this one; `key`: its
    key, where only who raises this knows it."""

    def __init__(self, reason: str, detail: str = "", key: str = ""):
        super().__init__(reason, detail, key)
        self.reason = reason
        self.detail = detail
        self.key = key


@dataclass(frozen=True)
class Cut:
    """Which square of a picture is kept. Its side is always the short side of the picture, so that it has to be placed
    along the long side only: that is scaling the short side to the wanted size, then cropping."""

    place: float = 0.5  # in [0, 1): 0 at the left or top end, 0.5 in the middle, near 1 at the other end
    mirrored: bool = False  # left to right, after cutting


def demuxer_of(data: bytes) -> str | None:
    """FFmpeg's name for the container of a clip, by its first bytes; None for what is not a clip."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):  # old QuickTime files have no ftyp
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"  # and WebM
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def open_container(data: bytes) -> InputContainer:
    """Open an encoded clip by PyAV. Raises BadSample for what is not a clip.

    The demuxer is named, not guessed: some that FFmpeg would guess, of playlists, follow links to other files.
    """
    demuxer = demuxer_of(data)
    if demuxer is None:
        raise BadSample("undecodable", f"not an mp4, QuickTime, WebM, Matroska or AVI file: begins with {data[:16]!r}")
    return av.open(io.BytesIO(data), mode="r", format=demuxer)


def decode_clip(
    data: bytes, frames: int, frame_rate: float, size: int, start: float = 0.0, cut: Cut | None = None
) -> Tensor:
    """Decode frames 1/frame_rate seconds apart from an encoded clip → (3, frames, size, size) uint8, all cut alike.

    start in [0, 1) chooses where in the clip they begin: 0 at its first frame, near 1 as late as they still fit.
    Only the part of the clip that is wanted is decoded, from the key frame before it. Raises BadSample.
    """
    try:
        with open_container(data) as container:
            if not container.streams.video:
                raise BadSample("undecodable", "no video stream")
            pictures = _pictures(container, frames, frame_rate, size, start, shown_until(container, data))
    except BadSample:
        raise
    except Exception as error:  # there is no end to what decoders raise for a broken file
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
    if len(pictures) < frames:
        raise BadSample("undecodable", f"only {len(pictures)} of {frames} frames could be decoded")
    clip = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return resize(clip, size, cut or Cut()).transpose(0, 1)


def _pictures(
    container, frames: int, frame_rate: float, size: int, start: float, until: Fraction
) -> list[np.ndarray]:
    """The wanted frames of an open clip as (H, W, 3) uint8 arrays as they are to be shown; fewer than `frames` if
    decoding ends early.

    Shown at a time is the frame whose time is the nearest, and where frames last longer than usual, the one that began
    before.
    """
    stream = container.streams.video[0]
    shape = shown_size(stream)  # of all frames, whatever later ones have
    check_size(*shape, size)
    stream.codec_context.thread_count = 1  # parallelism comes from the loader's workers
    rate = rate_of(stream)
    origin = start_of(stream)
    seconds = seconds_of(container, stream)
    apart = 1 / Fraction(frame_rate)
    room = seconds - (frames - 1) * apart
    if room <= 0:
        raise BadSample("too short", f"{float(seconds):.3g} s; {frames} frames at {frame_rate:g} fps take longer")
    first = origin + int(start * math.ceil(room * rate)) / rate
    if first > origin:
        container.seek(int(first / stream.time_base), stream=stream)
    slack = 1 / (2 * max(rate, stream.base_rate or rate))
    pictures: list[np.ndarray] = []
    for frame, time, lasts in timed(decoded(container, stream), rate, until):
        end = time + lasts
        while len(pictures) < frames and first + len(pictures) * apart <= end - min(slack, lasts / 2):
            pictures.append(as_shown(frame, shape))
        if len(pictures) == frames:
            return pictures
    while pictures and len(pictures) < frames and first + len(pictures) * apart < end:  # of the last frame
        pictures.append(as_shown(frame, shape))
    return pictures


def decoded(container, stream) -> Iterator[av.VideoFrame]:
    """Decode a clip's frames, from where it was left: with the transparency of a WebM, which FFmpeg's own decoders
    leave out, and with one picture of the two that an interlaced frame has on its even and odd lines."""
    see_through = stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in WITH_ALPHA
    frames = _with_alpha(container, stream) if see_through else container.decode(stream)
    for frame in frames:
        if frame.interlaced_frame:
            yield from _deinterlaced(itertools.chain([frame], frames), stream)
        else:
            yield frame


def _with_alpha(container, stream) -> Iterator[av.VideoFrame]:
    decoder: Any = av.CodecContext.create(WITH_ALPHA[stream.codec_context.name], "r")
    decoder.thread_count = 1
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _deinterlaced(frames: Iterator[av.VideoFrame], stream) -> Iterator[av.VideoFrame]:
    graph = av.filter.Graph()
    deinterlacer = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(graph.add_buffer(template=stream), deinterlacer, graph.add("buffersink")).configure()
    for frame in itertools.chain(frames, [None]):
        graph.push(frame)
        with contextlib.suppress(BlockingIOError, EOFError):  # it wants more, or there is no more
            while True:
                yield cast(av.VideoFrame, graph.pull())


def seconds_of(container, stream) -> Fraction:
    """How many seconds a clip lasts, as its file says or, where that says nothing or too little, as `measure` finds;
    leaves it at its start.

    An mp4 says how far apart frames are in the order of decoding, where B-frames come late: of frames at uneven
    distances it leaves the last ones out.
    """
    if told := (stream.duration or 0) * stream.time_base:
        if not stream.codec_context.has_b_frames or "mp4" not in container.format.name:
            return told
        container.seek((stream.start_time or 0) + stream.duration, stream=stream)  # to a key frame near the end
        return max(told, measure(container, stream)[1])
    if container.duration:  # of Matroska, which counts from 0
        return Fraction(container.duration, av.time_base) - start_of(stream)
    return measure(container, stream)[1]  # as recorders and streams leave it


def measure(container, stream) -> tuple[int, Fraction]:
    """How many frames a clip has from where it was left, and the second at which the last one shown ends, without
    decoding; leaves it at its start."""
    count, last = 0, Fraction(0)
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            if packet.pts is not None and not packet.is_discard:  # as an edit list has those that it cuts off
                start = stream.start_time or 0
                last = max(last, (packet.pts - start + (packet.duration or 0)) * packet.time_base)
    container.seek(stream.start_time or 0, stream=stream)
    return count, last


Timed = tuple[av.VideoFrame, Fraction, Fraction]
"""a frame, its time and for how long it is shown, in seconds"""


def timed(frames: Iterable[av.VideoFrame], rate: Fraction, until: Fraction) -> Iterator[Timed]:
    """Yield decoded frames with their times in seconds, without those that the next one replaces at once. rate: where a
    file has no times. until: the time at which the last one ends, unless it says itself that it lasts longer."""
    before, then = None, Fraction(0)
    for frame in frames:
        told = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        now = then + (1 / rate if before else 0) if told is None else told
        if before and now > then:
            yield before, then, now - then
        before, then = frame, now
    if before:
        lasts = before.duration * before.time_base if before.duration and before.time_base else 1 / rate
        yield before, then, max(lasts, until - then)


def rate_of(stream) -> Fraction:
    """The frames a second that a clip says it has, or UNKNOWN_RATE."""
    rate = stream.average_rate or UNKNOWN_RATE
    return Fraction(rate.numerator, rate.denominator)  # PyAV 19 has a type of its own


def start_of(stream) -> Fraction:
    """The time of a clip's first frame, in seconds."""
    return (stream.start_time or 0) * stream.time_base


def shown_size(stream) -> tuple[int, int]:
    """Width and height of a clip in square pixels, before it is turned: the smaller side of its own pixels counts."""
    width, height, aspect = stream.width, stream.height, stream.sample_aspect_ratio or 1
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def as_shown(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Give a frame as its file says it is to be shown, (H, W, 3) uint8: in RGB, on white where it is transparent, in
    square pixels, turned or mirrored.

    size: width and height before it is turned, `shown_size` or what it is to be scaled to.
    """
    width, height = size
    how = "BICUBIC" if (width, height) == (frame.width, frame.height) else SCALING
    is_opaque = not any(part.is_alpha for part in frame.format.components)
    form = "rgb24" if is_opaque else "rgba"
    # threads=1: a frame would have threads of its own, whose end a process that was forked waits for without end
    picture = frame.to_ndarray(format=form, width=width, height=height, interpolation=how, threads=1)
    if not is_opaque:
        picture = np.asarray(on_white(Image.fromarray(picture)))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()  # (x, y) → (ax + cy, bx + dy), y down
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def decode_image(data: bytes, size: int, cut: Cut | None = None) -> Tensor:
    """Decode an image → (3, 1, size, size) uint8, a clip of one frame.

    Upright as its EXIF orientation says; transparency on white. Raises BadSample.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that are out of order
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = opened(data)
            check_size(*image.size, size)
            ImageOps.exif_transpose(image, in_place=True)
            picture = np.asarray(image if is_plain(image) else on_white(image))
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]  # read only, of which torch warns
    except BadSample:
        raise
    except Exception as error:  # there is no end to what decoders raise for a broken file
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
    return resize(pixels, size, cut or Cut()).transpose(0, 1)


def check_size(width: int, height: int, size: int) -> None:
    """Raise BadSample for what would have to be magnified more than twice, and for what is too large to be meant."""
    if 2 * min(width, height) < size:
        raise BadSample("too small", f"{width}×{height} pixels for training at {size}×{size}")
    if max(width, height) > LARGEST_SIDE:
        raise BadSample("too large", f"{width}×{height} pixels; the longest side may be {LARGEST_SIDE}")


def resize(pictures: Tensor, size: int, cut: Cut) -> Tensor:
    """Cut to a square, then scale with antialiasing.  (N, 3, H, W) uint8 → (N, 3, size, size) uint8."""
    height, width = pictures.shape[2:]
    side = min(height, width)
    first = int(cut.place * (max(height, width) - side + 1))
    square = pictures.narrow(2 if height > width else 3, first, side)
    if side != size:
        square = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return square.flip(3) if cut.mirrored else square.contiguous()
