"""Compile every kernel ahead of time, without a GPU, and report what it costs: python -m mdm_kernels.aot

A shape class (shape_classes.py) calls an op's launching functions on meta tensors; `backend.recording` hands over what
these would launch; Triton's own JIT specialises and compiles each launch for every target. What an earlier report
already says of a kernel that is as it was can be taken from there (keys.py). Exit status: 0 if all is well; 1 if a
kernel fails to compile, spills registers or needs more shared memory than there is; 2 if nothing can be compiled here
at all.
"""

import argparse
import os
import sys
from pathlib import Path

from .compiler import compile_all, jobs, record
from .machine_code import TARGETS
from .report import markdown, table, write_json
from .shape_classes import SHAPE_CLASSES


def show_progress(done: int, total: int) -> None:
    """Show how many kernels are compiled, in one line on a terminal and in ten in a log."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} compiled", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done * 10 // total > (done - 1) * 10 // total:
        print(f"{done}/{total} compiled", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m mdm_kernels.aot` with these arguments, or with those of the process, and give its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mdm_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say only what is at fault: no table, which takes longer")
    parser.add_argument("--known", type=Path, metavar="FILE", help="take from what --json wrote all that is as it was")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page for the documentation there")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="LIST", help="default: %(default)s")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only shape classes whose name contains TEXT")
    options = parser.parse_args(arguments)
    if options.check and (options.json or options.markdown):
        parser.error("--check counts no instructions, which --json and --markdown would have to write down")
    if options.known and not options.known.exists():
        parser.error(f"--known: there is no {options.known}")
    targets = options.targets.split(",")
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    classes = {name: call for name, call in SHAPE_CLASSES.items() if options.filter in name}
    if not classes:
        parser.error(f"no shape class contains {options.filter!r}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    import triton

    from . import keys  # which imports Triton, too

    work = jobs(record(classes), targets)
    by_job = keys.known_results(options.known, work) if options.known else {}
    if options.known:
        print(f"{len(by_job)} of {len(work)} kernels are known from {options.known}", file=sys.stderr)
    rest = [number for number in range(len(work)) if number not in by_job]
    todo = compile_all([work[number] for number in rest], instructions=not options.check)
    for done, (index, result) in enumerate(todo, 1):
        launch, _ = work[rest[index]]
        by_job[rest[index]] = keys.with_key(result, launch) if options.json else result
        show_progress(done, len(rest))
    results = [by_job[number] for number in range(len(work))]
    if not options.check:
        print(table([result for result in results if not result.error]))
    if options.json:
        write_json(options.json, triton.__version__, results)
    if options.markdown:
        options.markdown.write_text(markdown(triton.__version__, results))
    faults = [result for result in results if result.fault]
    for result in faults:
        print(f"{result.label} ({result.shape_class}) on {result.target}: {result.fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
