"""What a run writes down: log.jsonl, TensorBoard events, skipped.jsonl and the progress bar."""

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mdm_models.training.data import Batch, Skip


class Logbook:
    """Continues the files of the run directory from `step`: what was logged after it, by a run that then died, goes.

    log.jsonl has one record per log interval; skipped.jsonl one line for every sample left out, naming shard and key.
    """

    def __init__(self, run: Path, step: int, steps: int):
        _rewrite(run / "log.jsonl", [record for record in _records(run / "log.jsonl") if record["step"] <= step])
        self._log = (run / "log.jsonl").open("a")
        self._named = {_identity(record): record for record in _records(run / "skipped.jsonl")}
        _rewrite(run / "skipped.jsonl", list(self._named.values()))
        self._skipped = (run / "skipped.jsonl").open("a")
        self.skips = Counter(record["reason"] for record in self._named.values())
        self._tensorboard = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        self.bar = tqdm(
            total=steps,
            initial=step,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log file wants few lines
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def record(self, step: int, **values: float | list[float]) -> None:
        """Log the numbers of the interval that ends with `step`; what is not finite is logged as null."""
        values = {name: _json_number(value) for name, value in values.items()}
        self._log.write(json.dumps({"step": step, **values, "skipped": dict(self.skips)}) + "\n")
        self._log.flush()
        curves = {f"skipped/{reason.replace(' ', '_')}": count for reason, count in self.skips.items()}
        for name, value in values.items():
            curves |= {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        for name, value in curves.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)

    def progress(self, interval: "Interval", world: int) -> None:
        """Advance the bar by one step and show how the interval goes."""
        numbers = interval.summary(world)
        self.bar.set_postfix_str(
            f"loss {numbers['loss']:.4f}, {numbers['step_seconds']:.2f} s/step, "
            f"{numbers['samples_per_second']:.1f} samples/s",
            refresh=False,
        )
        self.bar.update()

    def skip(self, skips: list[Skip]) -> None:
        """Count and name samples that were left out; each one once."""
        for skip in skips:
            record = {"shard": skip.shard, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
            if _identity(record) in self._named:
                continue
            self._named[_identity(record)] = record
            self.skips[skip.reason] += 1
            self._skipped.write(json.dumps(record) + "\n")
            self._skipped.flush()
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


class Interval:
    """Sums over the steps between two records; saving and sampling between steps do not count."""

    def __init__(self):
        self.steps = self.samples = 0
        self.seconds = self.waited = 0.0
        self.losses: list[float] = []
        self.skips: list[Skip] = []

    def begin(self) -> None:
        self._began = time.perf_counter()

    def received(self, batch: Batch) -> None:
        self.waited += time.perf_counter() - self._began
        self.samples += len(batch.captions)
        self.skips += batch.skipped

    def learned(self, loss: float) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        if math.isfinite(loss):
            self.losses.append(loss)

    def summary(self, world: int) -> dict[str, float]:
        """Mean loss, seconds a step and, of those, seconds waiting for data; samples/s of `world` processes."""
        return {
            "loss": sum(self.losses) / len(self.losses) if self.losses else math.nan,
            "step_seconds": self.seconds / self.steps,
            "data_seconds": self.waited / self.steps,
            "samples_per_second": self.samples * world / self.seconds,
        }


def _json_number(value: float | list[float]) -> float | list | None:
    if isinstance(value, list):
        return [_json_number(v) for v in value]
    return value if math.isfinite(value) else None


def _identity(record: dict) -> tuple[str, str]:
    return record["shard"], record["key"]


def _records(path: Path) -> list[dict]:
    """The whole lines of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _rewrite(path: Path, records: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.replace(path)
