"""The results of `benchmarks/kernels.py`: a page to read and JSON to keep."""

import csv
import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

from benchmarks.contenders import COMPILED, OURS, PYTORCH
from benchmarks.measure import KernelRow, Outcome
from benchmarks.report import markdown_table
from benchmarks.targets import verdicts
from benchmarks.timing import Timing

NONE = "–"


def read_json(path: Path) -> tuple[dict, list[KernelRow]]:
    """Read (machine, rows) as `report.write_json` wrote them."""

    def outcome(values: dict) -> Outcome:
        timing = Timing(**values["timing"]) if values["timing"] else None
        return dataclasses.replace(Outcome(**values), timing=timing)

    content = json.loads(path.read_text())
    rows = [
        KernelRow(**row | {"outcomes": {name: outcome(values) for name, values in row["outcomes"].items()}})
        for row in content["rows"]
    ]
    return content["machine"], rows


def csv_lines(rows: list[KernelRow]) -> str:
    """Write one line for everybody in each row, for other people's tools: times in seconds, sizes in bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("op", "shape", "step", "contender", "median", "fastest", "slowest", "peak", "error", "floor"))
    for row in rows:
        for name, outcome in row.outcomes.items():
            times = outcome.timing and (outcome.timing.median, outcome.timing.fastest, outcome.timing.slowest)
            measured = (*(times or ("", "", "")), outcome.peak, outcome.error, row.floor)
            writer.writerow((row.op, row.shape, row.step, name, *measured))
    return text.getvalue()


def markdown(machine: dict, rows: list[KernelRow]) -> str:
    """Write the page of results: ours against its floor, its rivals and its targets; then everybody; then what could
    not be measured."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    sections = [f"# Ops on {machine['device']}", facts, summary(machine, rows)]
    sections += [
        "Times are medians in µs (fastest to slowest) of calls in turn, on inputs that no cache holds. *Of floor*: the "
        "time of the least bytes at the copy rate, or of the operations at the matrix rate if longer, both measured in "
        "this run, over the time taken. Speed-ups are the rival's time over ours. Errors are relative to float64. "
        "Peak memory is above the inputs.",
        f"## {_title(machine)}",
        markdown_table(OURS_COLUMNS, [_ours(row, bool(machine["kernels ran"])) for row in rows]),
        "## Everybody",
        markdown_table(EVERYBODY_COLUMNS, [line for row in rows for line in _everybody(row)]),
        "## Not measured",
        _failures(rows),
    ]
    return "\n\n".join(sections) + "\n"


def _title(machine: dict) -> str:
    return "Ours" if machine["kernels ran"] else "Ours, as PyTorch references"


def summary(machine: dict, rows: list[KernelRow]) -> str:
    """Say whether the targets were met; without a GPU, that nothing was shown."""
    if not machine["kernels ran"]:
        return (
            '**No kernel ran.** Without a GPU "ours" are the PyTorch references of `mdm_kernels`, at small shapes: '
            "this shows that the benchmark works, and says nothing of the kernels. Targets are for a GPU."
        )
    judged = [verdict for row in rows for verdict in verdicts(row)]
    measured = [verdict for verdict in judged if verdict.reached is not None]
    rest = f"; {len(judged) - len(measured)} were not measured" if len(measured) < len(judged) else ""
    return f"Targets met: {sum(verdict.met for verdict in measured)} of {len(measured)}{rest}."


OURS_COLUMNS = (
    "op",
    "shape",
    "step",
    "µs",
    "rate",
    "of floor",
    f"× {PYTORCH}",
    f"× {COMPILED}",
    "× fastest rival",
    f"peak MB, {PYTORCH}'s",
    f"error, {PYTORCH}'s",
    "targets",
)


def _ours(row: KernelRow, judged: bool) -> tuple[str, ...]:
    time = row.seconds(OURS)
    ours, pytorch = row.outcomes.get(OURS, Outcome()), row.outcomes.get(PYTORCH, Outcome())
    rivals = row.rivals()
    fastest = min(rivals, key=rivals.__getitem__, default=None)

    def speed_up(rival: str) -> str:
        return f"{rivals[rival] / time:.2f}" if time and rival in rivals else NONE

    return (
        row.op,
        row.shape,
        row.step,
        _time(ours),
        _rate(row, time),
        _share(row.floor, time),
        speed_up(PYTORCH),
        speed_up(COMPILED),
        f"{speed_up(fastest)} ({fastest})" if time and fastest else NONE,
        f"{_megabytes(ours)}, {_megabytes(pytorch)}",
        f"{_error(ours)}, {_error(pytorch)}",
        "; ".join(map(str, verdicts(row))) if judged else NONE,
    )


EVERYBODY_COLUMNS = ("op", "shape", "step", "who", "µs", "rate", "of floor", "peak MB", "error", "launched by")


def _everybody(row: KernelRow) -> list[tuple[str, ...]]:
    return [
        (
            row.op,
            row.shape,
            row.step,
            name,
            _time(outcome),
            _rate(row, row.seconds(name)),
            _share(row.floor, row.seconds(name)),
            _megabytes(outcome),
            _error(outcome),
            outcome.launched,
        )
        for name, outcome in row.outcomes.items()
        if outcome.timing
    ]


def _failures(rows: list[KernelRow]) -> str:
    """Who did not run and why, with the number of rows."""
    failures = Counter((row.op, name, o.failure) for row in rows for name, o in row.outcomes.items() if o.failure)
    lines = [(op, name, str(count), reason.replace("|", "¦")) for (op, name, reason), count in failures.items()]
    return markdown_table(("op", "who", "rows", "reason"), lines) if lines else "Nothing: everybody ran everywhere."


def _time(outcome: Outcome) -> str:
    if outcome.timing is None:
        return NONE
    timing = outcome.timing
    median, fastest, slowest = (_microseconds(t) for t in (timing.median, timing.fastest, timing.slowest))
    return f"{median} ({fastest} to {slowest})"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.3g}"


def _rate(row: KernelRow, time: float | None) -> str:
    if time is None:
        return NONE
    if row.waits_for_memory:
        return f"{row.least_bytes / time / 1e9:.3g} GB/s"
    return f"{row.operations / time / 1e12:.3g} TFLOP/s"


def _share(floor: float, time: float | None) -> str:
    return NONE if time is None else f"{100 * floor / time:.0f} %"


def _megabytes(outcome: Outcome) -> str:
    return NONE if outcome.peak is None else f"{outcome.peak / 1e6:.3g}"


def _error(outcome: Outcome) -> str:
    return NONE if outcome.error is None else f"{outcome.error:.1e}"
