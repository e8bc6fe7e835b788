"""Which tiles GroupNorm + SiLU is fastest with on this GPU: python -m benchmarks.group_norm_tiles --out tiles.json

Channels-last images in bfloat16, at the sizes of the models in the batches of training and of sampling, in 32 groups:
the forward and the backward op, as graphs, on inputs that no cache holds; by `launch`'s rule, by tiles whatever the
size, and a group a program wherever it fits. The rule in mdm_kernels/group_norm/launch.py is written by hand from this.
`--stages N` makes the loops over a whole group as deep. The file is written after every row.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import CACHE_BYTES
from benchmarks.timing import Runner, time_side_by_side
from mdm_kernels import tiles
from mdm_kernels.group_norm import kernels, launch
from mdm_kernels.library import ops

GROUPS = 32
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Rule:
    """As `launch` says."""

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Tiles:
    """Every call by tiles of so many channels."""

    width: int
    elements: int
    warps: int

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        def row_tiles(channels: int, positions: int, channels_last: bool) -> tuple[dict, int, int]:
            block_c = min(tiles.next_power_of_2(channels), self.width)
            block_s = min(tiles.next_power_of_2(positions), self.elements // block_c)
            constants = {"BLOCK_C": block_c, "BLOCK_S": block_s, "num_warps": self.warps}
            return constants, tiles.count(positions, block_s), tiles.count(channels, block_c)

        by_tiles = {"whole_group": lambda *_: None, "row_tiles": row_tiles}
        with mock.patch.multiple(launch, **by_tiles):
            yield


@dataclass(frozen=True)
class WholeGroup:
    """A program a group, if it fits, however large the call."""

    elements_a_thread: int
    most_warps: int

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        def tile(channels: int, positions: int, *_) -> dict:
            block_c, block_s = tiles.next_power_of_2(channels), tiles.next_power_of_2(positions)
            warp = 32 * self.elements_a_thread
            num_warps = min(max(block_c * block_s // warp, 1), self.most_warps)
            return {"BLOCK_C": block_c, "BLOCK_S": min(block_s, num_warps * warp // block_c), "num_warps": num_warps}

        with mock.patch.multiple(launch, CHANNELS_LAST_BYTES=2**63, _whole_group_tile=tile):
            yield


CHOICES = (
    Rule(),
    *(Tiles(width, *size) for width in (32, 64, 128) for size in ((4096, 8), (4096, 4), (8192, 8))),
    *(WholeGroup(elements, warps) for elements in (8, 16) for warps in (8, 16)),
)


def sizes() -> list[tuple[int, int, int]]:
    """Batch, channels and side of the images."""
    batches = itertools.product((False, True), shapes.GROUP_NORMS.items())
    return [(shapes.SAMPLING_BATCH if sampling else batch, *shape) for sampling, (shape, batch) in batches]


def choices(channels: int, side: int) -> list[Rule | Tiles | WholeGroup]:
    fits = channels // GROUPS * side**2 * DTYPE.itemsize <= launch.WHOLE_GROUP_BYTES
    return [choice for choice in CHOICES if fits or not isinstance(choice, WholeGroup)]


def measure(
    choice: Rule | Tiles | WholeGroup, batch: int, channels: int, side: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Microseconds of the forward and of the backward op."""

    def image() -> Tensor:
        x = torch.randn(batch, channels, side, side, device=device, dtype=DTYPE)
        return x.contiguous(memory_format=torch.channels_last)

    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return ops.group_norm_silu_forward(x, None, GROUPS, weight, bias, None, None, 1e-5, True)

    def backward(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        return ops.group_norm_silu_backward(dy, x, None, mean, rstd, GROUPS, weight, bias, None, None, True)

    with choice.used():
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
            for choice in choices(channels, side):
                what = {"choice": type(choice).__name__} | dataclasses.asdict(choice)
                row = {"shape": [batch, channels, side], "stages": options.stages} | what
                rows.append(row | measure(choice, batch, channels, side, device, options.seconds))
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
                options.out.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()
