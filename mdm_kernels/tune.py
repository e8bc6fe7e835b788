"""Measure which tiles attention's kernels are fastest with on this GPU, and write them down: python -m mdm_kernels.tune

Each of six kernels runs at the widths of heads that models use, with few queries (a sampling step's) and with many,
with the tiles of its rule and with every candidate. One is written if it is faster than the rule by more than 2 %. The
file, mdm_kernels/tuned/<device>.json, is read at the next start; delete it to return to the rules.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from . import tiles
from .attention import launch
from .library import ops

WIDTHS = (32, 64, 96, 128)
HEADS = 8
TOKENS = {"few": (2, 256), "many": (16, 1024)}  # batch and tokens; 2 · 8 · 256 queries are few, 16 · 8 · 1024 many
CONTEXT = 128
WORTH = 0.98  # of the rule's time: what is less gain is noise

CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m in (32, 64, 128)
    for n in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]


def fastest(key: str, call: Callable[[], object], measure: Callable[[Callable], float]) -> dict[str, int] | None:
    """The candidate with which `call` is fastest, None if none is worth it. One that cannot run (too much shared memory
    or too many registers) is passed over."""
    best, least = None, WORTH * measure(call)
    for candidate in CANDIDATES:
        with tiles.trying(key, candidate):
            try:
                time = measure(call)
            except Exception as error:
                print(f"{key}: {candidate}: {type(error).__name__}", file=sys.stderr)
                continue
        if time < least:
            best, least = candidate, time
    return best


def calls(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """By `launch.tile_key`, what runs that kernel (a backward op runs two)."""
    found: dict[str, Callable[[], object]] = {}
    for width in WIDTHS:
        for batch, tokens in TOKENS.values():
            qkv = torch.randn(batch, tokens, 3 * HEADS * width, dtype=dtype, device=device)
            context = torch.randn(batch, CONTEXT, 2 * HEADS * width, dtype=dtype, device=device)
            for kernel, call in (_flash_calls(qkv) | _self_cross_calls(qkv, context)).items():
                found[launch.tile_key(kernel, dtype.itemsize, width, batch * HEADS * tokens)] = call
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


def tune(device: torch.device, dtype: torch.dtype, measure: Callable[[Callable], float]) -> dict[str, dict]:
    """{tile key: the tile that is worth writing down}"""
    chosen = {}
    for key, call in calls(device, dtype).items():
        best = fastest(key, call, measure)
        print(f"{key}: {best or 'as by rule'}", flush=True)
        if best:
            chosen[key] = best
    return chosen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mdm_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: mdm_kernels/tuned/<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m mdm_kernels.tune measures on a GPU, and torch sees none", file=sys.stderr)
        return 1
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)

    def median_time(call: Callable) -> float:
        return cast(float, triton.testing.do_bench(call, return_mode="median"))  # a list only of several quantiles

    chosen = tune(device, torch.bfloat16, median_time)
    out = options.out or tiles.file_of(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "tiles": chosen}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(chosen)} tiles in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
