"""What a run writes down: log.jsonl, curves, skipped.jsonl and the progress bar."""

import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mdm_models.data.reader import Skip
from mdm_models.storage import naming, write_whole
from mdm_models.training.config import TrainConfig
from mdm_models.training.monitor.interval import Interval
from mdm_models.training.monitor.weights_and_biases import WeightsAndBiases

TRAINING, EVALUATION = "training", "evaluation"  # kinds of records
SKIP = ("shard", "key", "reason")  # what every line of skipped.jsonl has
NOTHING = b"\0 \t\r"  # zeros: what a file system leaves where power was lost before the data came


class Logbook:
    """Continues the files of the run directory from `step`: what was logged after it, by a run that then died, goes.

    log.jsonl has a record per log interval ("kind": "training") and per evaluation ("evaluation"); skipped.jsonl a line
    for every sample left out, naming shard and key; TensorBoard and, if asked for, Weights & Biases have the curves.
    Raises TrainingError if Weights & Biases cannot be used.
    """

    def __init__(self, config: TrainConfig, step: int):
        run, steps = Path(config.out), config.optimizer.steps
        self._wandb = WeightsAndBiases(config) if config.output.wandb else None
        logged = _parsed(run / "log.jsonl")
        _rewrite(run / "log.jsonl", [r for r in logged if not _is_ours(r, ["step"]) or r["step"] <= step])
        self._log = (run / "log.jsonl").open("a")
        self._named = {_identity(record): record for record in records_of(run / "skipped.jsonl", *SKIP)}
        _rewrite(run / "skipped.jsonl", list(self._named.values()))
        self._skipped = (run / "skipped.jsonl").open("a")
        self.skips = Counter(record["reason"] for record in self._named.values())
        self._tensorboard = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        self._remaining = Remaining(steps)
        self.bar = tqdm(
            total=steps,
            initial=step,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log file wants few lines
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def record(self, step: int, kind: str = TRAINING, **values: float | list[float]) -> None:
        """Log numbers that were measured at `step`; what is not finite is logged as null.

        kind: "training", or a name that goes before those of the curves: "evaluation" makes evaluation/fid.
        """
        told: dict[str, Any] = {name: _json_number(value) for name, value in values.items()}
        prefix = "" if kind == TRAINING else f"{kind}/"
        curves = {}
        for name, value in told.items():
            entries = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            curves |= {prefix + entry: v for entry, v in entries.items() if v is not None}
        if kind == TRAINING:
            told["skipped"] = dict(self.skips)
            curves |= {f"skipped/{reason.replace(' ', '_')}": count for reason, count in self.skips.items()}
        _append(self._log, {"step": step, "kind": kind, **told})
        for name, value in curves.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(step, curves)

    def progress(self, interval: Interval) -> None:
        """Advance the bar by one step and show how the interval goes."""
        numbers = interval.summary()
        self.bar.update()
        self.bar.set_postfix_str(
            f"{self._remaining.after(self.bar.n)} left, loss {numbers['loss']:.4f}, "
            f"{numbers['step_seconds']:.2f} s/step, {numbers['samples_per_second']:.1f} samples/s, "
            f"MFU {numbers['mfu']:.1%}",
            refresh=False,
        )

    def skip(self, skips: list[Skip]) -> None:
        """Count and name samples that were left out; each one once."""
        for skip in skips:
            record = {"shard": skip.shard, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
            if _identity(record) in self._named:
                continue
            self._named[_identity(record)] = record
            self.skips[skip.reason] += 1
            _append(self._skipped, record)
            detail = f" ({skip.detail})" if skip.detail else ""
            self.say(f"skipped {skip.key} in {skip.shard}: {skip.reason}{detail}")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line)

    def close(self) -> None:
        self.bar.close()
        self._tensorboard.close()
        self._log.close()
        self._skipped.close()
        if self._wandb:
            self._wandb.close()


class Remaining:
    """How long the rest of a run of `steps` steps will take: as long a step as those since this process began, with all
    that was saved, sampled and evaluated between them. The first step, which compiles and fills caches, is left out."""

    def __init__(self, steps: int):
        self.steps = steps
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> str:
        """The time left after this step, as "1:02:03"; "?" after the first step of this process."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            return "?"
        first, began = self._first
        return tqdm.format_interval((self.steps - step) * (now - began) / (step - first))


def is_logged(run: Path, step: int, kind: str) -> bool:
    """Whether the run's log has a record of this kind at this step."""
    return any(r["step"] == step and r["kind"] == kind for r in records_of(run / "log.jsonl", "step", "kind"))


def _json_number(value: float | list[float]) -> float | list | None:
    if isinstance(value, list):
        return [_json_number(v) for v in value]
    return value if math.isfinite(value) else None


def _identity(record: dict) -> tuple[str, str]:
    return record["shard"], record["key"]


def records_of(path: Path, *names: str) -> list[dict]:
    """Read the records of a JSON-lines file that have entries of these names, of the types that ours have."""
    return [record for record in _parsed(path) if _is_ours(record, names)]


def _is_ours(record: object, names: Sequence[str]) -> bool:
    types = {name: int if name == "step" else str for name in names}
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in types.items())


def _parsed(path: Path) -> list:
    """What the lines of a JSON-lines file say. Lines that say nothing are left out, with a warning unless it is the
    last one, cut short by a crash."""
    records, garbled = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line := line.strip(NOTHING):
                records.append(json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            if number < len(lines):
                garbled.append(number)
    if garbled:
        which = f"line {garbled[0]}" + (f" and {len(garbled) - 1} more" if garbled[1:] else "")
        warnings.warn(f"{path}: {which} cannot be read and is left out", stacklevel=3)
    return records


def _append(file: TextIO, record: dict) -> None:
    with naming(file.name):
        file.write(json.dumps(record) + "\n")
        file.flush()


def _rewrite(path: Path, records: list) -> None:
    write_whole(path, lambda partial: partial.write_text("".join(json.dumps(record) + "\n" for record in records)))
