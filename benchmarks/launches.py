"""Ways of making one step, as Python launches them and as captured CUDA graphs: the time and the memory of each, or why
it was not measured; and the table of them."""

import dataclasses
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import Outcome, failed
from benchmarks.report import markdown_table
from benchmarks.timing import capture, peak_memory, time_side_by_side

GRAPH = ", graph"
"""ends the name of a way that was captured"""


@dataclass(frozen=True)
class WayRow:
    """One way of making one step of a model."""

    name: str
    shape: str
    step: str
    who: str
    outcome: Outcome
    floor: float | None = None
    """seconds that the arithmetic would take at the rate of a large matrix product"""


def outcomes(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    graphed: Collection[str] = (),
    error: Callable[[Any], float | None] = lambda results: None,
) -> dict[str, Outcome]:
    """Measure every call as Python launches it, then those named in `graphed` as graphs, each kind in turn; `error` is
    asked of the results of both.

    One kind after the other, because a graph holds its memory while it lives: beside what the same step takes from
    Python, it might not fit. A call's peak is what it allocates above what was there before; a graph's what its pool
    reserves, which is at least that. Whatever a call raises is its outcome, and the others go on.
    """

    def by_python(call: Callable) -> tuple[Callable, Any, int]:
        results = call()  # compiles, and makes what lasts, such as an optimizer's averages
        return call, results, peak_memory(call, device)

    graphs = {who + GRAPH: call for who, call in calls.items() if who in graphed}
    return {
        **_measured(calls, by_python, "Python", error, device, seconds),
        **_measured(graphs, _as_graph, "CUDA graph", error, device, seconds),
    }


def _measured(
    calls: Mapping[str, Callable[[], Any]],
    prepare: Callable[[Callable], tuple[Callable[[], object], Any, int]],
    launched: str,
    error: Callable[[Any], float | None],
    device: torch.device,
    seconds: float,
) -> dict[str, Outcome]:
    """prepare: of a call, what launches it, its results and its peak."""
    found: dict[str, Outcome] = {}
    ready: dict[str, Callable] = {}
    for who, call in calls.items():
        try:
            launch, results, peak = prepare(call)
            found[who] = Outcome(peak=peak, error=error(results), launched=launched)
            ready[who] = launch
            del results
        except Exception as failure:  # the official code may raise anything
            found[who] = failed(failure)
    for who, timing in time_side_by_side(ready, device, seconds=seconds).items():
        found[who] = dataclasses.replace(found[who], timing=timing)
    return found


def _as_graph(call: Callable[[], Any]) -> tuple[Callable[[], None], Any, int]:
    """→ what replays a graph of the call, the results of a replay, and the bytes of the graph's pool."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    replay, results = capture(call)
    replay()
    torch.cuda.empty_cache()
    return replay, results, torch.cuda.memory_reserved() - before


def table(rows: Sequence[WayRow], rivals: Sequence[str]) -> str:
    """Write a Markdown table: medians, how many times as fast as each rival, and as its graph where there is one, every
    way is, and its memory as a share of the last rival's, launched alike. What failed says why below the table."""
    found = {(row.name, row.step, row.who): row.outcome for row in rows}
    ways = {row.who for row in rows}
    compared = [who for rival in rivals for who in (rival, rival + GRAPH) if who in ways]

    def cells(row: WayRow) -> list[str]:
        timing, peak, error = row.outcome.timing, row.outcome.peak, row.outcome.error
        if timing is None or peak is None:
            return ["failed", *[""] * (len(compared) + 5)]
        times = [found.get((row.name, row.step, who), Outcome()).timing for who in compared]
        alike = rivals[-1] + (GRAPH if row.who.endswith(GRAPH) else "")
        peak_alike = found.get((row.name, row.step, alike), Outcome()).peak
        return [
            _milliseconds(timing.median),
            f"{_milliseconds(timing.fastest)} to {_milliseconds(timing.slowest)}",
            *(f"{time.median / timing.median:.2f}×" if time else "" for time in times),
            f"{100 * row.floor / timing.median:.0f} %" if row.floor else "",
            f"{peak / 1e6:.0f}",
            f"{100 * peak / peak_alike:.0f} %" if peak_alike else "",
            "" if error is None else f"{error:.1g}",
        ]

    of_time = ("ms", "min to max", *(f"× {who}" for who in compared), "of floor")
    columns = ("model", "shape", "step", "code", *of_time, "MB", f"of {rivals[-1]}'s", "error")
    lines = [(row.name, row.shape, row.step, row.who, *cells(row)) for row in rows]
    failures = [f"{row.name}, {row.step}, {row.who}: {row.outcome.failure}" for row in rows if row.outcome.failure]
    return "\n".join([markdown_table(columns, lines), *(["", *failures] if failures else [])])


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
