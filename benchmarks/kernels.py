"""Every op of `mdm_kernels` beside everybody else who computes it: time, memory, error, and the floor.

    python benchmarks/kernels.py                                # a GPU; results in benchmarks/results/<device>
    python benchmarks/kernels.py --quick --filter attention
    python benchmarks/kernels.py --device cpu --out /tmp/check  # without a GPU: only that the benchmark works

Rivals: plain PyTorch, the same under torch.compile, each backend of scaled_dot_product_attention, and apex, Liger,
xformers and diffusers where they are installed. Results are written after every row: kernels.json, kernels.md; at the
end, with --plot, roofline.png, speedups.png and kernels.csv.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

if (
    __name__ == "__main__"
):  # run as a file: find the packages beside benchmarks/, not its files (kernels is a package too)
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import figures, kernel_report, shapes
from benchmarks.case import Case, Place
from benchmarks.contenders import OURS
from benchmarks.machine import Rates, describe, slug
from benchmarks.measure import KernelRow, failed, measure, row, steps
from benchmarks.report import write_json
from mdm_kernels.tune import DTYPES

RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape an op: a first look")
    parser.add_argument("--experiments", action="store_true", help="what is off, beside what it would replace")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only rows whose op, shape and step contain TEXT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results (GPU: benchmarks/results/<device>)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.2, help="to repeat each call for (default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="draw roofline.png and speedups.png, write kernels.csv")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no GPU")
    if options.compile is None:
        options.compile = options.device.type == "cuda"
    if options.out is None:
        if options.device.type != "cuda":
            parser.error("--out is missing: benchmarks/results is for GPUs; say where to put what a CPU gives")
        options.out = RESULTS / slug(options.device)
    return options


def main(options: argparse.Namespace) -> None:
    device = options.device
    jobs = [(c, step) for c in _cases(options) for step in steps(c) if options.filter in f"{c.op} {c.shape} {step}"]
    if not jobs:
        sys.exit(f"--filter {options.filter!r}: no row contains it")
    rates = Rates.measured(device, DTYPES[options.dtype])
    machine = describe(device, options.dtype, rates) | {"kernels ran": device.type == "cuda"}
    rows: list[KernelRow] = []
    for case, step in (progress := tqdm(jobs, unit="row")):
        progress.set_description(f"{case.op} {case.shape}")
        try:
            rows.append(measure(case, step, rates, device, seconds=options.seconds, with_compile=options.compile))
        except Exception as error:  # inputs that do not fit, say: the other rows go on
            rows.append(row(case, step, rates, {OURS: failed(error)}))
        write_json(options.out / "kernels.json", machine, rows)
        (options.out / "kernels.md").write_text(kernel_report.markdown(machine, rows))
    if options.plot:
        figures.plot(options.out / "kernels.json")
        (options.out / "kernels.csv").write_text(kernel_report.csv_lines(rows))
    print(f"{len(rows)} rows in {options.out / 'kernels.md'}. {kernel_report.summary(machine, rows)}")


def _cases(options: argparse.Namespace) -> list[Case]:
    place = Place(options.device, DTYPES[options.dtype])
    if options.experiments:
        return shapes.experimental_cases(place)
    if options.device.type != "cuda":
        return shapes.small_cases(place)
    return shapes.quick_gpu_cases(place) if options.quick else shapes.gpu_cases(place)


if __name__ == "__main__":
    main(parse_arguments())
