"""Every op under a sanitizer, without a GPU: python -m tests.kernels.sanitize

ttsem runs what Triton's own front end compiles, bfloat16 included, and stops at an access outside a tensor, at a value
without meaning, and at two programs of one launch that touch an element which one of them writes. Every op runs forward
and backward, in float32 and bfloat16, group_norm along each of its paths, attention by TMA too (in bfloat16), every
kernel with at least two programs. Exit status: 0 if nothing was found or ttsem cannot run here, 1 otherwise.
"""

import collections
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton

from mdm_kernels import backend
from mdm_kernels.group_norm import launch as group_norm_launch
from tests.kernels import calls
from tests.kernels.calls import EVERY_OP, Call, by_tma
from tests.kernels.group_norm_paths import along

DTYPES = (torch.float32, torch.bfloat16)
CALLS: dict[str, Callable[[], Call]] = EVERY_OP | {
    "flash by TMA": lambda: by_tma(calls.flash(batch=2, heads=2, queries=33, keys=21, width=24)),
    "self_cross by TMA": lambda: by_tma(calls.self_cross(batch=2, tokens=19, context=21, heads=2, width=24)),
    "group_norm of many channels": lambda: calls.group_norm(4, 136, 3, 3, groups=4, film_rows=2),
}
"""Sizes that fill no tile, and such that no kernel has one program alone."""


@contextlib.contextmanager
def groups_in_one_pass() -> Iterator[None]:
    """With small tiles, so that programs wait for each other and leave each other tiles."""
    group_norm_launch.row_tiles.cache_clear()
    small = mock.patch.multiple(group_norm_launch, TILE=64, CHANNELS_LAST_TILE=64)
    try:
        with small, along("one pass"):
            yield
    finally:
        group_norm_launch.row_tiles.cache_clear()


PATHS = {
    "": contextlib.nullcontext,
    " walked": lambda: along("walked group"),
    " by tiles": lambda: along("tiles"),
    " in one pass": groups_in_one_pass,
}
EXCHANGED = {
    "one_pass_forward": ("means_ptr", "deviations_ptr", "mean_ptr", "rstd_ptr", "counters_ptr", "left_ptr"),
    "one_pass_backward": (
        *("sums_du_ptr", "sums_du_xhat_ptr", "mean_dz_ptr", "mean_dz_xhat_ptr", "counters_ptr", "left_ptr"),
    ),
}
"""What programs of one launch hand to each other, in an order that release and acquire force."""


def expect_exchanges(sanitize) -> None:
    """ttsem runs one program after the other and cannot tell an order that is forced from one that chance brought. It
    leaves out of its look for races what Inductor's scan exchanges so; have it leave out what our kernels do instead.
    All else, what is read from x and what is written of y and the gradients, stays looked at."""

    def spans(record, names, exchanged) -> list[tuple[int, int]]:
        return [(record.bases[name], record.bases[name] + record.pre[name].nbytes) for name in names]

    sanitize.lookback_buffers = lambda function, source: EXCHANGED.get(function.__name__, ())
    sanitize._protocol_spans = spans


def expect_tiles_of_a_head() -> None:
    """Triton makes one operation of a load by TMA and the reshape of its tile from [1, 1, rows, columns] to
    [rows, columns]; ttsem answers in the first shape. Have it answer in the second."""
    from ttsem import ops

    load = ops.OPS["tt.descriptor_load"]

    def reshaped(interpreter, operation, arguments) -> list:
        (tile,) = load(interpreter, operation, arguments)
        return [tile.reshape(operation.result_types[0].shape)]

    ops.OPS["tt.descriptor_load"] = reshaped


def compile_no_further_than_is_read() -> None:
    """ttsem has a kernel compiled to the end, reads its Triton IR and runs that. Have it compile to the Triton IR: what
    follows, down to machine code, took two thirds of the time."""
    from ttsem import harness

    def triton_ir(fn, args, kwargs, target) -> dict[str, str]:
        launch = types.SimpleNamespace(fn=fn, fn_name=fn.__name__, args=args, kwargs=kwargs)
        return {"ttir": harness._stage_text(launch, "ttir", target)}

    harness._compile_asm = triton_ir


@contextlib.contextmanager
def counted_programs() -> Iterator[collections.Counter]:
    """The most programs that each kernel was launched with."""
    most, launch = collections.Counter(), backend.launch

    def counted(kernel, grid, **arguments):
        name = kernel.fn.__name__
        most[name] = max(most[name], torch.Size(grid).numel())
        launch(kernel, grid, **arguments)

    backend.launch = counted
    try:
        yield most
    finally:
        backend.launch = launch


def why_skipped() -> str:
    """Why nothing can be sanitized here; empty if it can."""
    try:
        import ttsem  # noqa: F401
    except ImportError:
        return "ttsem is not installed (the Makefile says how)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return f"ttsem reads what Triton 3.9 writes, and this is {triton.__version__}"
    return ""


def main() -> int:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be sanitized; unset it", file=sys.stderr)
        return 1
    if reason := why_skipped():
        print(f"sanitize: skipped, as {reason}", file=sys.stderr)
        return 0
    from ttsem import sanitize

    expect_exchanges(sanitize)
    expect_tiles_of_a_head()
    compile_no_further_than_is_read()
    with sanitize.session(cuda_is_cpu=False) as session, backend.launching_on_cpu(), counted_programs() as programs:
        for name, make in CALLS.items():
            for path, taking_it in PATHS.items():
                if path and not name.startswith("group_norm"):
                    continue
                before = session.launches
                for dtype in DTYPES:
                    torch.manual_seed(0)
                    with taking_it():
                        make().to(dtype).run("triton")
                print(f"{name + path}: {session.launches - before} launches", flush=True)
                if session.launches == before:
                    print(f"{name + path} launched nothing", file=sys.stderr)
                    return 1
    alone = [kernel for kernel, count in programs.items() if count < 2]
    if alone:
        print(f"these kernels ran as one program, whose races nobody sees: {', '.join(alone)}", file=sys.stderr)
    if session.races_unchecked:
        print(f"{session.races_unchecked} launches were too large to be checked for races", file=sys.stderr)
    print(f"{session.launches} launches of {len(programs)} kernels, {session.races_unchecked} unchecked")
    return 1 if alone or session.races_unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
