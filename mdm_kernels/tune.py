"""Measure which tiles the kernels are fastest with on this GPU, and write them down: python -m mdm_kernels.tune

Attention's six kernels run at the widths of heads that models use, with few queries (a sampling step's) and with many;
GroupNorm at the models' sizes in channels_last, with few bytes and with many; temporal attention at clips of 16 frames:
each with the tiles of its rule and with every candidate, as captured graphs. One is written if it is faster than the
rule by more than 2 %, twice. The file, mdm_kernels/tuned/<device>.json, is read at the next start; delete it to return
to the rules. The multires ops have one tile, the largest whose noise fits registers.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, multiprocessing

from . import tiles
from .attention import launch
from .group_norm import launch as group_norm_launch
from .library import ops
from .temporal import launch as temporal_launch

HEADS = 8
TOKENS = {32: 1024, 64: 1024, 96: 256, 128: 256}
"""width of a head → tokens at which models have it"""
BATCHES = {1024: (1, 16), 256: (2, 64)}
"""tokens → batches of few queries, which are less than 16 896 in all heads, and of many"""
CONTEXT = 128
IMAGES = {(256, 64): 64, (512, 32): 64, (768, 16): 64, (64, 256): 16, (128, 128): 16, (32, 512): 16, (32, 1024): 8}
"""GroupNorm's channels and size → a batch of many bytes; those of few have 2"""
GROUPS = 32
CLIPS = ((16, 32), (16, 64))  # frames, and the width of a head
POSITIONS = 1024
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORTH = 0.98  # of the rule's time: what is less gain is noise


class Kernel(NamedTuple):
    """One kernel, or a few with one tile, at one key of `tiles.tuned`."""

    call: Callable[[], object]
    """what runs it; a backward op runs others too"""
    candidates: list[dict[str, int]]


CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m in (32, 64, 128)
    for n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]
"""of attention"""


def group_norm_candidates(channels: int, positions: int, itemsize: int) -> list[dict[str, int]]:
    """Give candidates that go by tiles and, where a group is small enough, ones that take a program a group; a thread
    holds 8, 16 or 32 elements, or up to 64 where a group is held in registers."""
    found = []
    for width in (32, 64, 128):
        block_c = min(tiles.next_power_of_2(channels), width)
        for elements, warps in ((4096, 4), (4096, 8), (8192, 8)):
            block_s = min(tiles.next_power_of_2(positions), elements // block_c)
            found.append({"whole": 0, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps})
    block_c, block_s = tiles.next_power_of_2(channels // GROUPS), tiles.next_power_of_2(positions)
    fits = channels // GROUPS * positions * itemsize <= group_norm_launch.WHOLE_GROUP_BYTES
    if fits:
        for elements, most_warps in itertools.product((8, 16), (8, 16)):
            warps = min(max(block_c * block_s // (32 * elements), 1), most_warps)
            tile = min(block_s, warps * 32 * elements // block_c)
            found.append({"whole": 1, "BLOCK_C": block_c, "BLOCK_S": tile, "num_warps": warps})
    if block_c * block_s <= group_norm_launch.HELD_GROUP:
        held = (warps for warps in (1, 2, 4, 8, 16) if 8 <= block_c * block_s // (32 * warps) <= 64)
        found += ({"whole": 1, "BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": warps} for warps in held)
    return [dict(candidate) for candidate in dict.fromkeys(tuple(candidate.items()) for candidate in found)]


def temporal_candidates(frames: int, width: int) -> list[dict[str, int]]:
    """Give candidates whose tile holds all frames of a position, each in heads `width` wide."""
    least, padded = launch.power_of_two(frames), launch.power_of_two(width)
    return [
        {"ROWS": rows, "WIDTH": padded, "num_warps": warps, "num_stages": 1}
        for rows in (16, 32, 64, 128)
        if rows >= least
        for warps in (1, 2, 4, 8)
    ]


def fastest(key: str, kernel: Kernel, measure: Callable[[Callable], float]) -> dict[str, int] | None:
    """Give the candidate with which the call is fastest, None if none is worth it or the best is not so once more. One
    that cannot run (too much shared memory or too many registers) is passed over."""

    def time_of(candidate: dict[str, int]) -> float:
        with tiles.trying(key, candidate):
            return measure(kernel.call)

    best, by_rule = None, measure(kernel.call)
    least = WORTH * by_rule
    for candidate in kernel.candidates:
        try:
            time = time_of(candidate)
        except Exception as error:
            print(f"{key}: {candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if time < least:
            best, least = candidate, time
    if best is None or time_of(best) >= WORTH * measure(kernel.call):
        best, least = None, by_rule
    print(f"{key}: {best or 'as by rule'}, {least / by_rule:.2f} of the rule's {by_rule:.4g} ms", flush=True)
    return best


def compile_share(index: int, processes: int, device: torch.device, dtype: torch.dtype, named: str) -> None:
    """Run, in one of so many processes, its share of all candidates once, so that Triton's cache holds them."""
    every = kernels(device, dtype, named).items()
    tries = ((key, kernel, candidate) for key, kernel in every for candidate in kernel.candidates)
    for key, kernel, candidate in itertools.islice(tries, index, None, processes):
        with tiles.trying(key, candidate), contextlib.suppress(Exception):  # which `fastest` says of what cannot run
            kernel.call()


def kernels(device: torch.device, dtype: torch.dtype, named: str = "") -> dict[str, Kernel]:
    """Give the kernels of all ops by their keys in `tiles.tuned`, those whose key holds `named`."""
    every = _attention(device, dtype) | _group_norm(device, dtype) | _temporal(device, dtype)
    return {key: kernel for key, kernel in every.items() if named in key}


def _attention(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    found = {}
    for width, tokens in TOKENS.items():
        for batch in BATCHES[tokens]:
            qkv = torch.randn(batch, tokens, 3 * HEADS * width, dtype=dtype, device=device)
            context = torch.randn(batch, CONTEXT, 2 * HEADS * width, dtype=dtype, device=device)
            for kernel, call in (_flash_calls(qkv) | _self_cross_calls(qkv, context)).items():
                key = launch.tile_key(kernel, dtype.itemsize, width, batch * HEADS * tokens)
                found[key] = Kernel(call, CANDIDATES)
    return found


def _flash_calls(qkv: Tensor) -> dict[str, Callable[[], object]]:
    q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    scale = q.shape[3] ** -0.5
    out, lse = ops.flash_attention_forward(q, k, v, None, scale)

    def backward():
        return ops.flash_attention_backward(out, q, k, v, None, out, lse, scale)

    return {
        "flash_forward": lambda: ops.flash_attention_forward(q, k, v, None, scale),
        "flash_query_gradient": backward,
        "flash_key_gradient": backward,
    }


def _self_cross_calls(qkv: Tensor, context: Tensor) -> dict[str, Callable[[], object]]:
    out, lse = ops.self_cross_attention_forward(qkv, context, None, HEADS)

    def backward():
        return ops.self_cross_attention_backward(out, qkv, context, None, out, lse, HEADS)

    return {
        "self_cross_forward": lambda: ops.self_cross_attention_forward(qkv, context, None, HEADS),
        "self_cross_query_gradient": backward,
        "self_cross_key_gradient": backward,
    }


def _group_norm(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    found = {}
    for (channels, size), many in IMAGES.items():
        candidates = group_norm_candidates(channels, size**2, dtype.itemsize)
        weight, bias = (torch.ones(channels, device=device) for _ in range(2))
        for batch in (2, many):
            x = torch.randn(batch, channels, size, size, dtype=dtype, device=device)
            x = x.to(memory_format=torch.channels_last)
            problem = group_norm_launch.Problem.of(x, None, GROUPS, weight, bias, None, None)
            for direction, call in _group_norm_calls(x, weight, bias).items():
                found[group_norm_launch.tile_key(direction, problem)] = Kernel(call, candidates)
    return found


def _group_norm_calls(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], object]]:
    def forward():
        return ops.group_norm_silu_forward(x, None, GROUPS, weight, bias, None, None, 1e-5, True)

    def backward():
        return ops.group_norm_silu_backward(y, x, None, mean, rstd, GROUPS, weight, bias, None, None, True)

    y, mean, rstd = forward()
    return {"forward": forward, "backward": backward}


def _temporal(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    found = {}
    for frames, width in CLIPS:
        qkv = torch.randn(4 * frames, POSITIONS, 3 * HEADS * width, dtype=dtype, device=device)
        for direction, call in _temporal_calls(qkv, frames).items():
            key = temporal_launch.tile_key(direction, frames, width, dtype.itemsize)
            found[key] = Kernel(call, temporal_candidates(frames, width))
    return found


def _temporal_calls(qkv: Tensor, frames: int) -> dict[str, Callable[[], object]]:
    out = ops.temporal_attention_forward(qkv, None, None, HEADS, frames)
    return {
        "forward": lambda: ops.temporal_attention_forward(qkv, None, None, HEADS, frames),
        "backward": lambda: ops.temporal_attention_backward(out, qkv, None, None, HEADS, frames),
    }


def tune(
    device: torch.device, dtype: torch.dtype, measure: Callable[[Callable], float], named: str = ""
) -> dict[str, dict]:
    """Time every kernel whose key holds `named` with every candidate and give {tile key: the tile that is worth writing
    down}."""
    best = {key: fastest(key, kernel, measure) for key, kernel in kernels(device, dtype, named).items()}
    return {key: tile for key, tile in best.items() if tile}


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m mdm_kernels.tune` with these arguments, or with those of the process, and give its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mdm_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: mdm_kernels/tuned/<device>.json")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only kernels whose key contains TEXT")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="that compile beside each other, before (default: 1)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m mdm_kernels.tune measures on a GPU, and torch sees none", file=sys.stderr)
        return 1
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)

    def median_time(call: Callable) -> float:
        # a list only of several quantiles
        return cast(float, triton.testing.do_bench_cudagraph(call, rep=4, return_mode="median"))

    dtype, processes = DTYPES[options.dtype], options.processes
    if processes > 1:
        multiprocessing.spawn(compile_share, (processes, device, dtype, options.filter), processes)
    chosen = tune(device, dtype, median_time, options.filter)
    out = options.out or tiles.file_of(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text())["tiles"] if out.exists() else {}
    measured = (f"{8 * dtype.itemsize} bits", options.filter)
    kept = {key: tile for key, tile in before.items() if not all(text in key for text in measured)}
    content = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "tiles": kept | chosen}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(chosen)} tiles written to {out}, {len(kept)} left as they were")
    return 0


if __name__ == "__main__":
    sys.exit(main())
