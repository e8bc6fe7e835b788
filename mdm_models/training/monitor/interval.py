"""What is measured between two records of the log."""

import math
import time
from collections.abc import Sequence

from mdm_models.data.reader import Skip
from mdm_models.data.stream import Batch
from mdm_models.training.monitor.throughput import Throughput


class Interval:
    """Sums over the steps between two records; saving, sampling and evaluating between steps do not count."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput
        self.steps = self.samples = 0
        self.seconds = self.waited = 0.0
        self.losses: list[float] = []
        self.skips: list[Skip] = []

    def begin(self) -> None:
        """Note that a step begins, with waiting for its data."""
        self._began = time.perf_counter()

    def received(self, chunks: Sequence[Batch]) -> None:
        """Note that all of this process's data for the step are here."""
        self.waited += time.perf_counter() - self._began
        for chunk in chunks:
            self.samples += len(chunk.captions)
            self.skips += chunk.skipped

    def learned(self, loss: float) -> None:
        """Note that the step is over, with its loss."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        if math.isfinite(loss):
            self.losses.append(loss)

    def summary(self) -> dict[str, float]:
        """Give, after one step or more, the mean loss; seconds a step and, of those, seconds waiting for data; samples
        a second of all processes; model FLOPs utilization."""
        samples_per_second = self.samples * self.throughput.world_size / self.seconds
        return {
            "loss": sum(self.losses) / len(self.losses) if self.losses else math.nan,
            "step_seconds": self.seconds / self.steps,
            "data_seconds": self.waited / self.steps,
            "samples_per_second": samples_per_second,
            "mfu": self.throughput.utilization(samples_per_second),
        }
