"""Pictures → an .mp4 that says how it is to be shown: when each picture is, for how long, and in which colours."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

TICKS = 90_000  # a second: a frame lasts a whole number of them at 24, 25, 30 and 30000/1001 frames a second
BT709, LIMITED = 1, 1  # FFmpeg's numbers of the colours of HD video, and of luma in 16…235

Frame = tuple[np.ndarray, Fraction, Fraction]
"""(H, W, 3) uint8, the second at which it is shown, for how many seconds"""


def write_mp4(target: Path | BinaryIO, frames: Iterable[Frame], size: tuple[int, int], rate: Fraction, crf: int) -> int:
    """Write an .mp4 in H.264; → how many frames it has.

    frames: in the order of their times, which may lie at any distance; size: their width and height, even; rate: at
    which most of them are shown, for players that ask; crf: x264's constant rate factor. Raises ValueError if the
    package av is missing.
    """
    try:
        import av
    except ImportError:
        raise ValueError("saving an .mp4 needs the package av: pip install av, or save a .gif or .webp") from None
    count = 0
    lasts: dict[int, int] = {}  # a frame's time → its duration, in ticks
    with av.open(target, "w", format="mp4") as container:
        options = {"crf": str(crf), "bf": "0"}  # beside B-frames an mp4 has no place for how long the last frame lasts
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"  # what browsers and phones play
        encoder = stream.codec_context
        encoder.time_base = Fraction(1, TICKS)
        encoder.thread_count = 1  # parallelism comes from several clips at once
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
        encoder.color_range = LIMITED

        def mux(packets: Iterable) -> None:
            for packet in packets:
                packet.duration = lasts.pop(packet.pts)
                container.mux(packet)

        for picture, time, duration in frames:
            count += 1
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
            frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
            lasts[frame.pts] = max(1, round(duration * TICKS))
            mux(stream.encode(frame))
        mux(stream.encode())
    return count


def evenly(pictures: Iterable[np.ndarray], rate: Fraction) -> Iterable[Frame]:
    """Give the pictures as frames that are each shown for 1/rate seconds."""
    return ((picture, i / rate, 1 / rate) for i, picture in enumerate(pictures))
