"""What GroupNorm + SiLU takes with each tile on this GPU: python -m benchmarks.group_norm_tiles --out tiles.json

Channels-last images in bfloat16, at the sizes of the models in the batches of training and of sampling, in 32 groups:
the forward and the backward op, as graphs, on inputs that no cache holds; by `launch`'s rule, and with every candidate
of `mdm_kernels.tune`, which writes the fastest down and no times. The rule in mdm_kernels/group_norm/launch.py is
written by hand from this. `--stages N` makes the loops over a whole group as deep. The file is written after every row.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import CACHE_BYTES
from benchmarks.timing import Runner, time_side_by_side
from mdm_kernels import tiles, tune
from mdm_kernels.group_norm import kernels, launch
from mdm_kernels.library import ops
from mdm_kernels.tune import GROUPS

DTYPE = torch.bfloat16


def sizes() -> list[tuple[int, int, int]]:
    """List batch, channels and side in pixels of the images."""
    batches = itertools.product((False, True), shapes.GROUP_NORMS.items())
    return [(shapes.SAMPLING_BATCH if sampling else batch, *shape) for sampling, (shape, batch) in batches]


@contextlib.contextmanager
def chosen(tile: dict[str, int] | None, x: Tensor) -> Iterator[None]:
    """Inside the block both ops run with that tile; None: with the one that the rule gives."""
    problem = launch.Problem.of(x, None, GROUPS, None, None, None, None)
    with contextlib.ExitStack() as stack:
        if tile:
            for direction in ("forward", "backward"):
                stack.enter_context(tiles.trying(launch.tile_key(direction, problem), tile))
        yield


def measure(
    tile: dict[str, int] | None, batch: int, channels: int, side: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Measure the microseconds of the forward and of the backward op."""

    def image() -> Tensor:
        x = torch.randn(batch, channels, side, side, device=device, dtype=DTYPE)
        return x.contiguous(memory_format=torch.channels_last)

    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return ops.group_norm_silu_forward(x, None, GROUPS, weight, bias, None, None, 1e-5, True)

    def backward(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        return ops.group_norm_silu_backward(dy, x, None, mean, rstd, GROUPS, weight, bias, None, None, True)

    with chosen(tile, image()):
        count = CACHE_BYTES[device.type] // (image().nbytes) + 1
        sets = [(x, image(), *forward(x)[1:]) for x in (image() for _ in range(count))]
        return {
            "forward µs": _microseconds(forward, [given[:1] for given in sets], device, seconds),
            "backward µs": _microseconds(backward, sets, device, seconds),
        }


def _microseconds(call: Callable, sets: list[tuple[Tensor, ...]], device: torch.device, seconds: float) -> float:
    runner = Runner.of(call, sets, device)
    timing = time_side_by_side({"": runner.run}, device, seconds=seconds)[""]
    return round(1e6 * timing.of_one_among(runner.calls).median, 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--stages", type=int, default=kernels.STAGES.value, help="default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.02, help="to repeat each graph for (default: %(default)s)")
    options = parser.parse_args(arguments)
    device, rows = torch.device(options.device), []
    with mock.patch.object(kernels, "STAGES", tl.constexpr(options.stages)):
        for batch, channels, side in sizes():
            for tile in (None, *tune.group_norm_candidates(channels, side**2, DTYPE.itemsize)):
                row = {"shape": [batch, channels, side], "stages": options.stages, "tile": tile}
                rows.append(row | measure(tile, batch, channels, side, device, options.seconds))
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
                options.out.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()
