"""Which tile a program of temporal_attention works on: ROWS rows, each one frame at one position, by WIDTH channels;
and the launches.

Chosen by `python -m mdm_kernels.aot`: tiles of up to 2048 elements spill on no target. 16-bit tiles of 4096 (64 frames
of heads 64 wide, 32 of 128) are allowed too, although their backward pass spills some registers on some targets.
"""

from torch import Tensor

from .. import backend, plans, tiles
from ..attention.checks import MAX_HEAD_WIDTH
from ..attention.launch import power_of_two

MAX_BYTES = 64 * 64 * 2  # of one tile; the backward pass holds several


def tile_shape(frames: int, head_width: int, itemsize: int) -> tuple[int, int]:
    """Give (ROWS, WIDTH) of a tile. Short clips share one: pairs of rows at different positions are computed and
    dropped, which is free on the matrix units but not in float32, so that float32 tiles are as small as the frames
    allow."""
    width = power_of_two(head_width)
    rows = 16 if itemsize == 4 else min(64, 2048 // width)
    return max(rows, power_of_two(frames)), width


def fits(frames: int, head_width: int, itemsize: int) -> bool:
    """Whether a tile holds all frames of a position, in heads no wider than what was compiled ahead of time."""
    rows, width = tile_shape(frames, head_width, itemsize)
    return head_width <= MAX_HEAD_WIDTH and rows * width * itemsize <= MAX_BYTES


def tile_key(direction: str, frames: int, head_width: int, itemsize: int) -> str:
    """Give the key by which `tiles.tuned` tells the tiles of a "forward" or "backward" call apart."""
    return f"temporal_{direction}, {8 * itemsize} bits, {head_width} wide, {frames} frames"


def tile_options(frames: int, head_width: int, itemsize: int) -> dict[str, int]:
    """Give the tile and the launch options of both kernels, where nobody measured them."""
    rows, width = tile_shape(frames, head_width, itemsize)
    warps = min(8, rows * width // (512 if itemsize == 2 else 256))
    return {"ROWS": rows, "WIDTH": width, "num_warps": warps, "num_stages": 1}


@plans.planned
def forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, num_heads: int, frames: int) -> None:
    """Write the output, (B·T, L, C), to `out`."""
    from . import kernels

    arguments, grid = _shared("forward", qkv, cos, sin, num_heads, frames)
    backend.launch(kernels.temporal_forward, grid, **arguments, out_ptr=out, **_strides(out=out))


@plans.planned
def backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, dqkv: Tensor, num_heads: int, frames: int
) -> None:
    """Write the gradient of qkv, (B·T, L, 3C), to `dqkv`."""
    from . import kernels

    arguments, grid = _shared("backward", qkv, cos, sin, num_heads, frames)
    backend.launch(
        kernels.temporal_backward, grid, **arguments, grad_ptr=grad, dqkv_ptr=dqkv, **_strides(grad=grad, dqkv=dqkv)
    )


def _shared(
    direction: str, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, frames: int
) -> tuple[dict, tuple]:
    """The arguments that both kernels take, and the grid: one program per clip, group of positions and head."""
    rows, positions, channels = qkv.shape
    width = channels // (3 * num_heads)
    measured = tiles.tuned(qkv.device, tile_key(direction, frames, width, qkv.element_size()))
    tile = measured or tile_options(frames, width, qkv.element_size())
    groups = tiles.count(positions, tile["ROWS"] // frames)
    arguments = {
        **{"qkv_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, **_strides(qkv=qkv)},
        **{"H": num_heads, "L": positions, "scale": width**-0.5, "T": frames, "D": width, "ROTARY": cos is not None},
        **tile,
    }
    return arguments, (rows // frames * groups * num_heads,)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """{"qkv_row": …}: the kernel arguments that say where the elements of a (B·T, L, C) tensor lie."""
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(("row", "position", "column"), tensor.stride(), strict=True)
    }
