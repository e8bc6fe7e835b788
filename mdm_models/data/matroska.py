"""When the last frame of a Matroska or WebM file ends: its blocks need not say how long they last, the file does."""

from fractions import Fraction

import av

SEGMENT = b"\x18\x53\x80\x67"  # the element that holds all but the EBML header; RFC 9559


def shown_until(container, data: bytes) -> Fraction:
    """The time, in seconds, at which an open file ends. 0 if it is of another kind, whose frames have durations, or
    does not say, or lacks its own end, as a download that was cut off: its last frame is not the last one then."""
    is_whole = "matroska" in container.format.name and _is_whole(data)
    return Fraction(container.duration or 0, av.time_base) if is_whole else Fraction(0)


def _is_whole(data: bytes) -> bool:
    """Whether the segment is there to its end, and tells it: of a live recording all bits of its size are 1."""
    size, begin = _number(data, 4)
    begin += size
    size, first = _number(data, begin + 4)
    return data[begin : begin + 4] == SEGMENT and first + size <= len(data)


def _number(data: bytes, begin: int) -> tuple[int, int]:
    """A variable-size integer of EBML, RFC 8794 section 4, and where it ends: as many zero bits as further bytes."""
    end = begin + 9 - data[begin].bit_length()
    return int.from_bytes(data[begin:end], "big") & ((1 << 7 * (end - begin)) - 1), end
