import math

import pytest
import torch

from mdm_models.data.reader import Skip
from mdm_models.data.stream import Batch
from mdm_models.training.monitor import interval as module
from mdm_models.training.monitor.interval import Interval
from mdm_models.training.monitor.throughput import Peak, Throughput


def batch(samples: int, *skips: Skip) -> Batch:
    return Batch(torch.zeros(samples, 3, 1, 2, 2, dtype=torch.uint8), [""] * samples, list(skips))


@pytest.fixture
def interval(monkeypatch) -> Interval:
    """Two steps of 2 s each, half a second of them waiting for 2 chunks of 3 samples; 10 s between them."""
    clock = iter([0.0, 0.5, 2.0, 12.0, 12.5, 14.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    measured = Interval(Throughput(1e9, Peak(1.2e10, "made up"), world_size=2))
    for loss in (1.0, math.nan):
        measured.begin()
        measured.received([batch(3), batch(3, Skip("a.tar", "k", "too short", ""))])
        measured.learned(loss)
    return measured


def test_an_interval_counts_its_steps_alone(interval):
    summary = interval.summary()
    assert (summary["step_seconds"], summary["data_seconds"]) == (2.0, 0.5)


def test_the_samples_are_those_of_all_chunks_and_processes(interval):
    assert interval.summary()["samples_per_second"] == 12 * 2 / 4.0


def test_utilization_is_the_models_operations_over_those_of_all_devices(interval):
    assert interval.summary()["mfu"] == pytest.approx(6.0 * 1e9 / (2 * 1.2e10))


def test_the_mean_loss_is_over_finite_steps(interval):
    assert interval.summary()["loss"] == 1.0


def test_skips_are_collected(interval):
    assert [skip.key for skip in interval.skips] == ["k", "k"]
