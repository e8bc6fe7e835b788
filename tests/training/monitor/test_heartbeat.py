"""What a monitor can read of a run."""

import json
import time
from pathlib import Path

import pytest

from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.monitor import heartbeat
from mdm_models.training.monitor.heartbeat import HEARTBEAT, Heartbeat
from tests.training.models import settings


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """Of a run of six steps."""
    (tmp_path / "run").mkdir()
    return changed(settings(tmp_path / "a.tar", tmp_path / "run"), prometheus=str(tmp_path / "mdm.prom"))


def read(config: TrainConfig) -> dict:
    return json.loads((Path(config.out) / HEARTBEAT).read_text())


def test_a_heartbeat_tells_step_time_loss_and_speed(config):
    Heartbeat(config).beat(3, 0.25, 12.0)
    found = read(config)
    assert (found["step"], found["steps"], found["loss"], found["samples_per_second"]) == (3, 6, 0.25, 12.0)
    assert found["state"] == "training"
    assert abs(time.time() - found["time"]) < 60


def test_heartbeats_are_written_every_few_seconds_not_every_step(config, monkeypatch):
    beats = Heartbeat(config)
    beats.beat(1, 0.5, 1.0)
    beats.beat(2, 0.5, 1.0)
    assert read(config)["step"] == 1
    monkeypatch.setattr(heartbeat, "EVERY", 0.0)
    beats.beat(3, 0.5, 1.0)
    assert read(config)["step"] == 3


@pytest.mark.parametrize(("step", "state"), [(6, "finished"), (4, "stopped")])
def test_the_last_one_tells_how_the_run_ended(config, step, state):
    beats = Heartbeat(config)
    beats.beat(step, 0.5, 1.0)
    beats.end(step)
    assert read(config)["state"] == state
    assert read(config)["loss"] == 0.5


def test_a_loss_that_is_no_number_is_null_and_no_metric(config):
    Heartbeat(config).beat(1, float("nan"), 1.0)
    assert read(config)["loss"] is None
    assert "mdm_training_loss" not in Path(config.output.prometheus).read_text()


def test_metrics_for_prometheus_are_in_its_text_format(config):
    Heartbeat(config).beat(3, 0.25, 12.0)
    lines = Path(config.output.prometheus).read_text().splitlines()
    assert len(lines) == 15
    samples = [line for line in lines if not line.startswith("#")]
    assert f'mdm_training_step{{run="{config.out}"}} 3' in samples
    assert f'mdm_training_loss{{run="{config.out}"}} 0.25' in samples
    for number, line in enumerate(lines):
        kind = ("# HELP ", "# TYPE ", "mdm_training_")[number % 3]
        assert line.startswith(kind)
