"""One guided call of a model, as Python runs it and as a captured CUDA graph: python -m benchmarks.graphs --models a,b

On our ops and on plain PyTorch, in bfloat16, on a batch of two; and whether a graph's results are those of Python, bit
for bit. At such a batch the difference is what Python and the launches cost.
"""

import argparse
import contextlib

import torch
from torch import Tensor

from benchmarks.models import SIZES, ModelCase
from benchmarks.plain import plain_pytorch
from benchmarks.timing import capture, time_side_by_side

WAYS = {"ours": contextlib.nullcontext, "plain": plain_pytorch}


def measure(name: str, device: torch.device, seconds: float) -> None:
    """Print the times of a model's call in each way, and whether the graphs' results are Python's, bit for bit."""
    case = ModelCase(name, 2, torch.bfloat16, device)
    model = case.model.to(torch.bfloat16).eval()
    x, context = [level.contiguous() for level in case._clean_levels()], case.context.bfloat16()
    calls = {}
    for who, way in WAYS.items():

        def call(way=way) -> list[Tensor]:
            with torch.no_grad(), way():
                return model(x, case.time, context)

        calls[who] = call
        if device.type == "cuda":
            replay, results = capture(call)
            expected = call()
            replay()
            same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
            print(f"{name}, {who}: the graph's results are {'' if same else 'NOT '}Python's, bit for bit", flush=True)
            calls[f"{who}, graph"] = replay
    times = time_side_by_side(calls, device, seconds=seconds)
    print(f"{name}: " + ", ".join(f"{who} {1e3 * timing.median:.2f} ms" for who, timing in times.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mdm_t2i_64", metavar="NAMES", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--device", default="cuda", help="default: %(default)s; a cpu has no graphs")
    parser.add_argument("--seconds", type=float, default=1.0, help="to repeat each call for (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in options.models.split(","):
        measure(name, torch.device(options.device), options.seconds)


if __name__ == "__main__":
    main()
