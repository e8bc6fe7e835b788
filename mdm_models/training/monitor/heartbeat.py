"""What a monitor reads of a run at work: RUN/heartbeat.json and, if asked for, a file in Prometheus' text format."""

import json
import math
import os
import socket
import time
from pathlib import Path

from mdm_models.training.config import TrainConfig

HEARTBEAT = "heartbeat.json"
EVERY = 5.0  # seconds, at most
METRICS = {  # of the numbers of a heartbeat: what they are
    "time": "Seconds since 1970 at which the run last made a step",
    "step": "Optimizer steps made",
    "steps": "Optimizer steps of the whole run",
    "loss": "Mean training loss since the last record of the log",
    "samples_per_second": "Samples a second over all processes",
}


class Heartbeat:
    """Says that a run lives and how far it is: {"time": seconds since 1970, "step", "steps", "loss",
    "samples_per_second", "state": "training" | "stopped" | "finished", "host", "pid"}.

    A reader sees each file whole. A number that there is none of is null, or left out for Prometheus.
    """

    def __init__(self, config: TrainConfig):
        self._steps = config.optimizer.steps
        self._run = Path(config.out)
        self._prometheus = Path(config.output.prometheus) if config.output.prometheus else None
        self._last: dict = {"loss": None, "samples_per_second": None}
        self._written = -math.inf

    def beat(self, step: int, loss: float, samples_per_second: float) -> None:
        """Say after a step how far the run is; written if the last time was EVERY seconds ago."""
        self._last = {"loss": loss if math.isfinite(loss) else None, "samples_per_second": samples_per_second}
        if time.monotonic() - self._written >= EVERY:
            self._write(step, "training")

    def end(self, step: int) -> None:
        """Say at once that the run has ended at this step: "finished" if it was the last one, else "stopped"."""
        self._write(step, "finished" if step >= self._steps else "stopped")

    def _write(self, step: int, state: str) -> None:
        self._written = time.monotonic()
        numbers = {"time": time.time(), "step": step, "steps": self._steps, **self._last}
        who = {"state": state, "host": socket.gethostname(), "pid": os.getpid()}
        _replace(self._run / HEARTBEAT, json.dumps(numbers | who) + "\n")
        if self._prometheus:
            _replace(self._prometheus, _prometheus_text(numbers, str(self._run)))


def _prometheus_text(numbers: dict[str, float | None], run: str) -> str:
    """In the text exposition format 0.0.4, as node_exporter's textfile collector reads it."""
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, what in METRICS.items():
        if (value := numbers[name]) is not None:
            metric = f"mdm_training_{name}"
            lines += [f"# HELP {metric} {what}.", f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {value!r}']
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")  # not flushed: after a crash of the machine it says nothing new
    partial.write_text(text)
    partial.replace(path)
