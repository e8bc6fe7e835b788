"""What becomes of memory that a step has freed, on a CPU: it is kept for the next one.

By default glibc gives free memory back to the system beyond 64 MB, which a step asks for again a moment later: for one
of mdm_t2i_emoji_64, 60 to 80 thousand pages to clear and map, 5 to 10 % of its processor time.
"""

import contextlib
import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
LARGEST = 32 << 20  # bytes; what is larger goes back at once, as ever: glibc's own limit
KEPT = 256 << 20  # more gained nothing


def keep_freed_memory() -> None:
    """Keep up to KEPT bytes of what is freed from here on, with glibc; not if the environment says how malloc works.

    For commands alone: a user's own program decides for itself.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told:
        return
    with contextlib.suppress(AttributeError, TypeError):  # another C library; Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, KEPT)
