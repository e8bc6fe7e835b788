"""Which tile a program of temporal_attention works on: ROWS rows, each one frame at one position, by WIDTH channels.

Chosen by `python -m mdm_kernels.aot`: tiles of up to 2048 elements spill on no target. 16-bit tiles of 4096 (64 frames
of heads 64 wide, 32 of 128) are allowed too, although their backward pass spills some registers on some targets.
"""

from mdm_kernels.attention.checks import MAX_HEAD_WIDTH
from mdm_kernels.attention.tiling import power_of_two

MAX_BYTES = 64 * 64 * 2  # of one tile; the backward pass holds several


def tile_shape(frames: int, head_width: int, itemsize: int) -> tuple[int, int]:
    """(ROWS, WIDTH). Short clips share a tile: pairs of rows at different positions are computed and dropped, which is
    free on the matrix units but not in float32, so that float32 tiles are as small as the frames allow."""
    width = power_of_two(head_width)
    rows = 16 if itemsize == 4 else min(64, 2048 // width)
    return max(rows, power_of_two(frames)), width


def fits(frames: int, head_width: int, itemsize: int) -> bool:
    """Whether a tile holds all frames of a position, in heads no wider than what was compiled ahead of time."""
    rows, width = tile_shape(frames, head_width, itemsize)
    return head_width <= MAX_HEAD_WIDTH and rows * width * itemsize <= MAX_BYTES


def tile_options(frames: int, head_width: int, itemsize: int) -> dict[str, int]:
    """The tile and the launch options of both kernels."""
    rows, width = tile_shape(frames, head_width, itemsize)
    warps = min(8, rows * width // (512 if itemsize == 2 else 256))
    return {"ROWS": rows, "WIDTH": width, "num_warps": warps, "num_stages": 1}


def grid(clips: int, positions: int, num_heads: int, frames: int, rows: int) -> tuple[int]:
    """One program per clip, group of positions and head."""
    groups = -(-positions // (rows // frames))
    return (clips * groups * num_heads,)
