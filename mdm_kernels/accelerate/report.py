"""What `accelerate` did to a model: printed as a table, and undone."""

from dataclasses import dataclass, field
from typing import NamedTuple

from .changes import Changes


class Entry(NamedTuple):
    """One part of a model, swapped or left as it was."""

    path: str
    """the name of the module, as `model.get_submodule` takes it"""
    part: str
    """swapped: "GroupNorm", "GroupNorm + SiLU", "GroupNorm + FiLM + SiLU" or "Attention"; left: the class"""
    remark: str
    """swapped: the op that it runs now; left: why"""


@dataclass
class Report:
    """The result of `accelerate`: `print(report)` shows a table, `swapped` and `left` are its entries."""

    model: str
    """the class of the model"""
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes, repr=False)

    def undo(self) -> None:
        """Give the model back its own classes, activations and attention processors; its tensors were never touched.

        What somebody else has replaced since stays as it is. A second call does nothing.
        """
        self.changes.undo()

    def __str__(self) -> str:
        headline = f"{self.model}: {len(self.swapped)} parts swapped, {len(self.left)} left"
        rows = [("swapped", *row) for row in _grouped(self.swapped)] + [("left", *row) for row in _grouped(self.left)]
        if not rows:
            return headline
        rows.insert(0, ("", "part", "count", "runs as / is left because", "first at"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([headline, *lines])


def _grouped(entries: list[Entry]) -> list[tuple[str, str, str, str]]:
    """One row (part, count, remark, first path) for all entries that differ in their path alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, part, remark in entries:
        groups.setdefault((part, remark), []).append(path or "(the model itself)")
    return [(part, str(len(paths)), remark, paths[0]) for (part, remark), paths in groups.items()]
