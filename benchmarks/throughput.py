"""What the fused ops gain the models on this machine: each beside plain PyTorch, beside its floor.

    python benchmarks/throughput.py --quick
    python benchmarks/throughput.py --models mdm_t2i_64,mdm_t2v_64 --batch 8 --json results.json
    python benchmarks/throughput.py --models mdm_t2i_64,mdm_t2i_1024 --reference ml-mdm    # beside the official code
    python benchmarks/throughput.py --models mdm_t2i_64 --batch 32 --cuda-graphs           # without what Python costs

On a GPU "ours" are the Triton kernels; on a CPU they are the references of `mdm_kernels`. Times are medians of calls
made in turn. The floor is the time that the arithmetic would take at the rate of a large matrix product, measured
first. Memory is what a step allocates at its peak above weights and Adam's averages; a graph's, what its pool reserves.
benchmarks/kernels.py measures the ops by themselves.
"""

import argparse
import sys
from pathlib import Path

import torch

if (
    __name__ == "__main__"
):  # run as a file: find the packages beside benchmarks/, not its files (kernels is a package too)
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import launches, models, official
from benchmarks.launches import WayRow
from benchmarks.machine import Rates, describe
from benchmarks.report import ModelRow, table, write_json
from mdm_kernels.tune import DTYPES
from mdm_models import list_models


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, *_ = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model: under a minute on a laptop")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write every number there, the table to FILE.md")
    parser.add_argument("--models", metavar="NAMES", help="comma-separated model names (default: what fits)")
    parser.add_argument("--batch", type=int, default=1, help="batch size of the models")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--reference", type=Path, metavar="CHECKOUT", help="of apple/ml-mdm: compare with it, on the same weights"
    )
    parser.add_argument("--backward", action="store_true", help="with --reference: measure the backward pass too")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="measure each step as a captured graph too; needs a GPU"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each call")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    if options.cuda_graphs and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--cuda-graphs: needs a GPU; --device is {options.device}")
    if options.models is not None:
        for name in options.models.split(","):
            if name not in models.SIZES:
                parser.error(f"--models {name!r}: no such model; known are {', '.join(list_models())}")
    if options.reference is not None:
        _check_reference(parser, options)
    return options


def _check_reference(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.models = options.models or "mdm_t2i_64"
    for name in options.models.split(","):
        if name not in official.CONFIGS:
            parser.error(f"--models {name!r}: the official code has {', '.join(official.CONFIGS)}")
    try:
        official.source(options.reference)
    except ValueError as error:
        parser.error(f"--reference: {error}")


def main(options: argparse.Namespace) -> None:
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rates = Rates.measured(device, dtype)
    machine = describe(device, options.dtype, rates)
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    print(facts, end="\n\n")
    seconds = min(options.seconds, 0.3) if options.quick else options.seconds
    rows: list[ModelRow] = []
    ways: list[WayRow] = []
    for name in _model_names(options, device):
        _progress(name)
        if options.reference:
            which = {"backward": options.backward, "graphs": options.cuda_graphs}
            ways += official.measure(name, options.reference, options.batch, device, seconds, **which)
            continue
        case = models.ModelCase(name, options.batch, dtype, device)
        if options.cuda_graphs:
            ways += models.measure_graphs(case, rates, seconds)
        else:
            rows += models.measure(case, rates, seconds)
    _progress("")
    rivals = (official.FLOAT32, official.AUTOCAST) if options.reference else ("plain",)
    shown = launches.table(ways, rivals) if ways else table(rows)
    print(shown)
    if options.json:
        write_json(options.json, machine, ways or rows)
        options.json.with_suffix(".md").write_text(f"{facts}\n\n{shown}\n")


def _model_names(options: argparse.Namespace, device: torch.device) -> list[str]:
    return options.models.split(",") if options.models else models.default_names(device, options.quick)


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(parse_arguments())
