"""What `mdm evaluate` found, as it is printed and written."""

import json
from dataclasses import dataclass
from pathlib import Path

from mdm_models.evaluation.measure import Sampling
from mdm_models.storage import write_whole


@dataclass(frozen=True)
class Row:
    """The numbers of one way of sampling. ema_std: the width of the average that was sampled; None: the model's own."""

    ema_std: float | None
    sampling: Sampling
    numbers: dict[str, float]


def protocol_line(rows: list[Row], drawn: str, networks: list[str]) -> str:
    """What must be equal for numbers to be comparable, in one line. drawn: what samples are; networks: their judges."""
    sampling = rows[0].sampling
    count = int(rows[0].numbers["evaluated_samples"])
    ways = dict.fromkeys((row.sampling.guidance_scale, row.sampling.num_inference_steps) for row in rows)
    guided = ", ".join(f"guidance {guidance:g} in {steps} steps" for guidance, steps in ways)
    widths = ", ".join(dict.fromkeys(f"{row.ema_std:g}" for row in rows if row.ema_std is not None))
    how = f"{count} {drawn}, seed {sampling.seed}; {sampling.sampler}, {guided}"
    return "; ".join([how, *([f"averages of width {widths}"] if widths else []), *networks])


def report(rows: list[Row], protocol: str, settings: dict[str, object], file: Path | None) -> None:
    """Print the numbers, as a table if there are several rows, and the protocol; write all of it to `file` as JSON."""
    first, *others = rows
    print(_table(rows) if others else _aligned([[name, f"{value:.6g}"] for name, value in first.numbers.items()]))
    print(f"protocol: {protocol}")
    if file:
        told = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        found = {"settings": told, "protocol": protocol, "results": first.numbers}
        if others:
            found["table"] = [{"ema_std": row.ema_std} | vars(row.sampling) | {"results": row.numbers} for row in rows]
        write_whole(file, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


def _table(rows: list[Row]) -> str:
    names = [name for name in rows[0].numbers if name != "evaluated_samples"]
    columns = {
        "guidance": [f"{row.sampling.guidance_scale:g}" for row in rows],
        "steps": [str(row.sampling.num_inference_steps) for row in rows],
    } | {name: [f"{row.numbers[name]:.6g}" for row in rows] for name in names}
    stds = [f"{row.ema_std:g}" for row in rows if row.ema_std is not None]
    if stds:
        columns = {"ema_std": stds} | columns
    return _aligned([list(columns), *map(list, zip(*columns.values(), strict=True))])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
