"""Which kernels of group_norm_silu run for which shapes, with which tiles and warps.

A group that fits is one program's work: held in registers if it is one tile (register_kernels.py), else walked tile by
tile (kernels.py). Larger ones, and channels-last calls on much memory, go by tiles in three launches (tile_kernels.py),
or in one (one_pass_kernels.py), an experiment that the environment variable MDM_KERNELS_ONE_PASS=1 turns on.

What `tiles.tuned` knows of a size on the GPU that is there comes before these rules. Theirs for channels_last were
measured on an H100 in bfloat16 (benchmarks/NOTES.md), those for contiguous were not.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments, backend, plans, tiles
from ..layouts import is_channels_last
from ..tiles import next_power_of_2

WHOLE_GROUP_BYTES = 128 * 1024  # of x; all groups in flight then fit a cache of 40 MB, in backward with those of dy
HELD_GROUP = 16384  # elements of a channels-last group's tile that registers hold without spilling, in backward too
CHANNELS_LAST_BYTES = 4 * 2**20  # of x and the skip; tiles win there over groups that registers do not hold
MANY_BYTES = 16 * 2**20  # a training step's; `tiles.tuned` tells calls of fewer apart
SMALL_GROUP = 8192  # elements for which one launch beats three, however few bytes of a group lie side by side
TILE = 8192  # elements of a contiguous tile
CHANNELS_LAST_TILE = 4096  # of a channels-last one, in 4 warps
CHANNELS_LAST_WIDTHS = (128, 32)  # its channels: the first that divides all, else the last (64 bytes in bf16)
COUNTERS = 8  # of a unit in one pass: a memory sector

_one_pass = os.environ.get("MDM_KERNELS_ONE_PASS", "0")
arguments.check_choice("MDM_KERNELS_ONE_PASS", _one_pass, ("0", "1"))


@contextlib.contextmanager
def one_pass(choice: str = "1") -> Iterator[None]:
    """Inside the block, what is not one program's work a group is normalised in one pass ("1") or by tiles ("0")."""
    global _one_pass
    before, _one_pass = _one_pass, choice
    plans.forget()
    try:
        yield
    finally:
        _one_pass = before
        plans.forget()


class Problem(NamedTuple):
    """What the launches of one call share."""

    rows: int
    """N"""
    groups: int
    """of all rows, N·G: one program each where a group is a program's work"""
    channels: int
    """of x and the skip"""
    itemsize: int
    arguments: dict
    """of the kernels: weight, bias, scale, shift and the latter's row strides; G groups, S positions, the x rows that
    one row of scale and shift serves, C_SKIP channels of the skip; CHANNELS of a group, CHANNELS_LAST"""

    @classmethod
    def of(cls, x: Tensor, skip: Tensor | None, num_groups: int, weight, bias, scale, shift) -> "Problem":
        """Describe a call of `group_norm_silu` with these arguments."""
        scale, shift = (film if film is None or film.stride(1) == 1 else film.contiguous() for film in (scale, shift))
        film_rows = next((film.shape[0] for film in (scale, shift) if film is not None), x.shape[0])
        skip_channels = 0 if skip is None else skip.shape[1]
        channels = x.shape[1] + skip_channels
        arguments = {
            "weight_ptr": None if weight is None else weight.contiguous(),
            "bias_ptr": None if bias is None else bias.contiguous(),
            "scale_ptr": scale,
            "shift_ptr": shift,
            "scale_stride": 0 if scale is None else scale.stride(0),
            "shift_stride": 0 if shift is None else shift.stride(0),
            "G": num_groups,
            "S": math.prod(x.shape[2:]),
            "frames": x.shape[0] // max(film_rows, 1),
            "C_SKIP": skip_channels,
            "CHANNELS": channels // num_groups,
            "CHANNELS_LAST": is_channels_last(x),
        }
        return cls(x.shape[0], x.shape[0] * num_groups, channels, x.itemsize, arguments)

    def some(self, *names: str) -> dict:
        """Give the kernel arguments of these names."""
        return {name: self.arguments[name] for name in names}


def whole_group(problem: Problem, tensors: int) -> dict | None:
    """Give the constants of the kernels that take a whole group and read so many tensors of x's size; None where tiles
    are better."""
    channels, positions, channels_last = (problem.arguments[name] for name in ("CHANNELS", "S", "CHANNELS_LAST"))
    elements = channels * positions
    call_bytes = problem.groups * elements * problem.itemsize
    narrow = channels * problem.itemsize < 16 and elements > SMALL_GROUP
    held = channels_last and next_power_of_2(channels) * next_power_of_2(positions) <= HELD_GROUP
    tiles_win = channels_last and (narrow or (call_bytes >= CHANNELS_LAST_BYTES and not held))
    too_large = elements * problem.itemsize > WHOLE_GROUP_BYTES or _passes_int32(problem)
    if tiles_win or too_large or channels > 1024:
        return None
    if held:
        return _held_group_tile(channels, positions, tensors)
    return _walked_group_tile(channels, positions, channels_last, tensors)


@functools.cache
def _held_group_tile(channels: int, positions: int, tensors: int) -> dict:
    """The whole group, 32 elements a thread; forward, which reads x alone, at most 8 warps hold it, in up to 64."""
    block_c, block_s = next_power_of_2(channels), next_power_of_2(positions)
    num_warps = min(max(block_c * block_s // 1024, 1), 8 if tensors == 1 else 16)
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": num_warps}


def _is_held(problem: Problem, tile: dict) -> bool:
    """Whether a program's tile is its whole group, and registers hold it."""
    return tile["BLOCK_S"] >= problem.arguments["S"] and tile["BLOCK_C"] * tile["BLOCK_S"] <= HELD_GROUP


@functools.cache
def _walked_group_tile(channels: int, positions: int, channels_last: bool, tensors: int) -> dict:
    """A thread holds 8 elements, a 16-byte load in half precision; of x alone in channels_last two such loads."""
    block_c, block_s = next_power_of_2(channels), next_power_of_2(positions)
    warp_tile = 32 * (16 if channels_last and tensors == 1 else 8)
    num_warps = min(max(block_c * block_s // warp_tile, 1), 8 if channels_last else 16)
    block_s = min(block_s, max(num_warps * warp_tile // block_c, 1))
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": num_warps}


@functools.cache
def row_tiles(channels: int, positions: int, channels_last: bool) -> dict:
    """Give the constants of the kernels that walk tiles."""
    block_c, block_s = next_power_of_2(channels), next_power_of_2(positions)
    if channels_last:
        dividing = (width for width in CHANNELS_LAST_WIDTHS if channels % width == 0)
        block_c = min(block_c, next(dividing, CHANNELS_LAST_WIDTHS[-1]))
        block_s = min(block_s, CHANNELS_LAST_TILE // block_c)
    else:
        block_s = min(block_s, TILE)
        block_c = min(block_c, TILE // block_s)
    num_warps = min(max(block_c * block_s // 1024, 1), 8)
    return {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": num_warps}


def _tiles_of_a_row(problem: Problem, tile: dict) -> tuple[int, int]:
    """How many there are along its positions, and along its channels."""
    return tiles.count(problem.arguments["S"], tile["BLOCK_S"]), tiles.count(problem.channels, tile["BLOCK_C"])


def tile_key(direction: str, problem: Problem) -> str:
    """Give the key by which `tiles.tuned` tells the tiles of a "forward" or "backward" call apart."""
    channels, groups, positions = problem.channels, problem.arguments["G"], problem.arguments["S"]
    layout = "channels last" if problem.arguments["CHANNELS_LAST"] else "contiguous"
    many = problem.rows * channels * positions * problem.itemsize >= MANY_BYTES
    return (
        f"group_norm_{direction}, {8 * problem.itemsize} bits, {channels} channels in {groups} groups, "
        f"{positions} positions, {layout}, {'many' if many else 'few'} bytes"
    )


def choice(direction: str, problem: Problem, x: Tensor) -> tuple[bool, dict]:
    """Choose whether a group is a program's work, and the constants of the kernels that do it so; measured, or by rule.
    Measured: BLOCK_C, BLOCK_S, num_warps, and 1 for "whole", which calls that are too large for it leave aside."""
    measured = tiles.tuned(x.device, tile_key(direction, problem))
    if measured and not (measured["whole"] and _passes_int32(problem)):
        return bool(measured["whole"]), {name: value for name, value in measured.items() if name != "whole"}
    whole = whole_group(problem, 1 if direction == "forward" else 2)
    if whole is not None:
        return True, whole
    return False, row_tiles(problem.channels, problem.arguments["S"], problem.arguments["CHANNELS_LAST"])


def _passes_int32(problem: Problem) -> bool:
    """Whether the call has more elements than the kernels that take a whole group can count."""
    return problem.rows * problem.channels * problem.arguments["S"] >= 2**31


@functools.cache
def _combine_statistics_tile(channels: int, row: int) -> dict:
    return {"BLOCK": min(next_power_of_2(channels * row), 1024), "num_warps": 4}


@functools.cache
def _combine_gradients_tile(channels: int, row: int) -> dict:
    block_c = min(next_power_of_2(channels), 64)
    return {"BLOCK_C": block_c, "BLOCK_T": min(next_power_of_2(row), 1024 // block_c), "num_warps": 4}


@functools.cache
def _unit(groups: int, channels: int, block_c: int, column: int) -> dict:
    """The least number of a row's channel blocks that hold whole groups, and these groups."""
    blocks = min(math.lcm(channels, block_c) // block_c, column)
    return {"UNIT_BLOCKS": blocks, "UNIT_GROUPS": groups if blocks == column else blocks * block_c // channels}


def _one_pass_plan(problem: Problem, x: Tensor, tile: dict) -> tuple[tuple[int], dict]:
    """The grid of a launch in one pass, and what both of its kernels take."""
    row, column = _tiles_of_a_row(problem, tile)
    unit = _unit(problem.arguments["G"], problem.arguments["CHANNELS"], tile["BLOCK_C"], column)
    units = problem.rows * tiles.count(column, unit["UNIT_BLOCKS"])
    tickets = units * unit["UNIT_BLOCKS"] * row
    counters = plans.scratch(units + 1, COUNTERS, like=x, dtype=torch.int32, zero=True)
    left = plans.scratch(tickets, like=x, dtype=torch.int32)
    return (tickets,), {"counters_ptr": counters, "left_ptr": left, "tiles": row} | tile | unit


@functools.cache
def _affine_tile(rows: int) -> dict:
    """32 channels are 128 bytes of float32."""
    return {"BLOCK_N": min(next_power_of_2(max(rows, 1)), 128), "BLOCK_C": 32, "num_warps": 4}


@functools.cache
def _film_tile(frames: int) -> dict:
    return {"BLOCK_T": min(next_power_of_2(max(frames, 1)), 8), "BLOCK_C": 128, "num_warps": 4}


@plans.planned
def forward(
    x: Tensor, skip: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, num_groups: int,
    weight, bias, scale, shift, eps: float, silu: bool,
) -> None:  # fmt: skip
    """Write the result to `y`, and each group's mean, shifted as kernels.py says, and reciprocal deviation, float32 (N,
    G), to `mean` and `rstd`."""
    from . import kernels, one_pass_kernels, register_kernels, tile_kernels

    problem = Problem.of(x, skip, num_groups, weight, bias, scale, shift)
    tensors = {"x_ptr": x, "skip_ptr": skip}
    everything = problem.arguments | {"SILU": silu}
    whole, tile = choice("forward", problem, x)
    if whole:
        kernel = register_kernels.held_group_forward if _is_held(problem, tile) else kernels.group_forward
        backend.launch(
            kernel, (problem.groups,), **tensors, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, eps=eps, **everything, **tile,
        )  # fmt: skip
        return
    row, column = _tiles_of_a_row(problem, tile)
    grid = (problem.rows * row * column,)
    means, deviations = (plans.scratch(problem.rows, row, problem.channels, like=x) for _ in range(2))
    partial = {"means_ptr": means, "deviations_ptr": deviations, "tiles": row}
    combine = _combine_statistics_tile(problem.arguments["CHANNELS"], row)
    if _one_pass == "1":
        grid, plan = _one_pass_plan(problem, x, tile)
        backend.launch(
            one_pass_kernels.one_pass_forward, grid, **tensors, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, eps=eps,
            BLOCK=combine["BLOCK"], **everything, **partial | plan,
        )  # fmt: skip
        return
    backend.launch(
        tile_kernels.tile_statistics, grid, **tensors, **partial,
        **problem.some("G", "S", "C_SKIP", "CHANNELS", "CHANNELS_LAST"), **tile,
    )  # fmt: skip
    backend.launch(
        tile_kernels.combine_statistics, (problem.groups,), **partial, mean_ptr=mean, rstd_ptr=rstd, eps=eps,
        TILE_S=tile["BLOCK_S"], **problem.some("G", "S", "CHANNELS"), **combine,
    )  # fmt: skip
    backend.launch(
        tile_kernels.apply_forward, grid, **tensors, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, tiles=row,
        **everything, **tile,
    )  # fmt: skip


@plans.planned
def backward(
    dy: Tensor, x: Tensor, skip: Tensor | None, dx: Tensor, dskip: Tensor | None, mean: Tensor, rstd: Tensor,
    num_groups: int, weight, bias, scale, shift, dweight, dbias, dscale, dshift, silu: bool,
) -> None:  # fmt: skip
    """Write the gradients dx, dskip, dweight, dbias (C,), dscale and dshift (N / T, C), those that are not None."""
    problem = Problem.of(x, skip, num_groups, weight, bias, scale, shift)
    totals = {
        name: plans.scratch(problem.rows, problem.channels, like=x, zero=dy.numel() == 0)
        for name in ("sum_du_ptr", "sum_du_xhat_ptr")
    }
    if dy.numel():
        _input_gradients(problem, dy, x, skip, dx, dskip, mean, rstd, totals, silu)
    _parameter_gradients(problem, totals, dweight, dbias, dscale, dshift)


def _input_gradients(
    problem: Problem, dy: Tensor, x: Tensor, skip: Tensor | None, dx, dskip, mean, rstd, totals: dict, silu: bool
) -> None:
    """Write dx and dskip, and the sums (N, C) of du and du·x̂ over positions that the other gradients follow from."""
    from . import kernels, one_pass_kernels, register_kernels, tile_kernels

    tensors = {"dy_ptr": dy, "x_ptr": x, "skip_ptr": skip, "mean_ptr": mean, "rstd_ptr": rstd}
    results = {"dx_ptr": dx, "dskip_ptr": dskip}
    everything = problem.arguments | {"SILU": silu}
    whole, tile = choice("backward", problem, x)
    if whole:
        kernel = register_kernels.held_group_backward if _is_held(problem, tile) else kernels.group_backward
        backend.launch(kernel, (problem.groups,), **tensors, **results, **totals, **everything, **tile)
        return
    row, column = _tiles_of_a_row(problem, tile)
    grid = (problem.rows * row * column,)
    tile_sums = {
        name: plans.scratch(problem.rows, row, problem.channels, like=x)
        for name in ("sums_du_ptr", "sums_du_xhat_ptr")
    }
    group_means = {name: plans.scratch(*mean.shape, like=x) for name in ("mean_dz_ptr", "mean_dz_xhat_ptr")}
    combine = _combine_gradients_tile(problem.arguments["CHANNELS"], row)
    if _one_pass == "1":
        grid, plan = _one_pass_plan(problem, x, tile)
        backend.launch(
            one_pass_kernels.one_pass_backward, grid, **tensors, **results, **tile_sums, **totals, **group_means,
            COMBINE_C=combine["BLOCK_C"], COMBINE_T=combine["BLOCK_T"], **everything, **plan,
        )  # fmt: skip
        return
    backend.launch(tile_kernels.tile_gradient_sums, grid, **tensors, **tile_sums, tiles=row, **everything, **tile)
    backend.launch(
        tile_kernels.combine_gradient_sums, (problem.groups,), **tile_sums, **totals, **group_means, tiles=row,
        **problem.some("weight_ptr", "scale_ptr", "scale_stride", "G", "S", "frames", "CHANNELS"), **combine,
    )  # fmt: skip
    backend.launch(
        tile_kernels.apply_backward, grid, **tensors, **results, **group_means, tiles=row, **everything, **tile
    )


def _parameter_gradients(problem: Problem, totals: dict, dweight, dbias, dscale, dshift) -> None:
    from . import kernels

    if dweight is not None or dbias is not None:
        tile = _affine_tile(problem.rows)
        backend.launch(
            kernels.affine_gradients, (tiles.count(problem.channels, tile["BLOCK_C"]),), **totals,
            dweight_ptr=dweight, dbias_ptr=dbias, N=problem.rows, C=problem.channels,
            **problem.some("scale_ptr", "scale_stride", "frames"), **tile,
        )  # fmt: skip
    if dscale is not None or dshift is not None:
        film_rows = (dshift if dscale is None else dscale).shape[0]
        tile = _film_tile(problem.arguments["frames"])
        backend.launch(
            kernels.film_gradients, (film_rows * tiles.count(problem.channels, tile["BLOCK_C"]),), **totals,
            dscale_ptr=dscale, dshift_ptr=dshift, C=problem.channels,
            **problem.some("weight_ptr", "bias_ptr", "frames"), **tile,
        )  # fmt: skip
