"""What a benchmark found: rows, as a table to read and as JSON to keep."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Timing


@dataclass(frozen=True)
class ModelRow:
    """One thing measured both ways: "ours" and "plain" are the keys of timings (seconds) and peaks (bytes)."""

    name: str
    shape: str
    step: str
    samples: int
    timings: dict[str, Timing]
    peaks: dict[str, int]
    floor: float

    @property
    def speedup(self) -> float:
        """How many times as fast as plain PyTorch we are, by medians."""
        return self.timings["plain"].median / self.timings["ours"].median

    @property
    def samples_per_second(self) -> float:
        """The samples that we do in a second, by the median."""
        return self.samples / self.timings["ours"].median

    @property
    def floor_fraction(self) -> float:
        """The share of our median time that the floor is."""
        return self.floor / self.timings["ours"].median


COLUMNS = (
    "what",
    "shape",
    "step",
    "ours ms",
    "plain ms",
    "speed-up",
    "samples/s",
    "floor ms",
    "of floor",
    "peak MB",
    "plain MB",
)


def table(rows: list[ModelRow]) -> str:
    """Write a Markdown table of the rows; times are medians."""
    return markdown_table(COLUMNS, [_cells(row) for row in rows])


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, aligned so that it can be read as text too."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([row(columns), rule, *map(row, lines)])


def _cells(row: ModelRow) -> tuple[str, ...]:
    milliseconds = {who: 1000 * timing.median for who, timing in row.timings.items()}
    return (
        row.name,
        row.shape,
        row.step,
        f"{milliseconds['ours']:.3g}",
        f"{milliseconds['plain']:.3g}",
        f"{row.speedup:.2f}×",
        f"{row.samples_per_second:.3g}",
        f"{1000 * row.floor:.3g}",
        f"{100 * row.floor_fraction:.0f} %",
        f"{row.peaks['ours'] / 1e6:.3g}",
        f"{row.peaks['plain'] / 1e6:.3g}",
    )


def write_json(path: Path, machine: dict, rows: list) -> None:
    """Write every number behind the table, with the machine."""
    content = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
