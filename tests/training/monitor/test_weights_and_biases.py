import sys
from types import SimpleNamespace

import pytest

from mdm_models.data.config import DataConfig
from mdm_models.errors import TrainingError
from mdm_models.training.config import OptimizerConfig, OutputConfig, TrainConfig
from mdm_models.training.monitor.logbook import Logbook


class StandIn(SimpleNamespace):
    """A module `wandb` that notes what it is told."""

    class Run:
        def __init__(self, told: dict):
            self.told, self.logged, self.axes, self.finished = told, [], [], False

        def define_metric(self, name: str, step_metric: str) -> None:
            self.axes.append((name, step_metric))

        def log(self, numbers: dict) -> None:
            self.logged.append(numbers)

        def finish(self) -> None:
            self.finished = True

    def __init__(self):
        super().__init__(runs=[], errors=SimpleNamespace(Error=type("Error", (Exception,), {})), refusal=None)

    def init(self, **told) -> "StandIn.Run":
        if self.refusal:
            raise self.errors.Error(self.refusal)
        self.runs.append(self.Run(told))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        str(tmp_path),
        DataConfig(("none.tar",)),
        optimizer=OptimizerConfig(steps=9),
        output=OutputConfig(wandb="pixels"),
    )


def test_a_run_is_opened_with_its_project_name_and_settings(wandb, config, tmp_path):
    Logbook(config, 0).close()
    told = wandb.runs[0].told
    assert (told["project"], told["name"], told["dir"]) == ("pixels", tmp_path.name, str(tmp_path))
    assert told["config"]["optimizer"]["steps"] == 9
    assert wandb.runs[0].finished


def test_curves_go_there_with_their_step(wandb, config):
    book = Logbook(config, 0)
    book.record(3, loss=0.5, level_losses=[0.1, 0.2])
    book.record(3, "evaluation", frechet_distance=7.0)
    book.close()
    run = wandb.runs[0]
    assert run.axes == [("*", "step")]
    assert run.logged == [
        {"step": 3, "loss": 0.5, "level_losses/0": 0.1, "level_losses/1": 0.2},
        {"step": 3, "evaluation/frechet_distance": 7.0},
    ]


def test_a_resumed_run_is_the_same_run_there(wandb, config):
    for step in (0, 5):
        Logbook(config, step).close()
    first, second = (run.told for run in wandb.runs)
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"


def test_without_the_package_the_error_says_what_to_do(monkeypatch, config):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with pytest.raises(TrainingError, match="pip install wandb"):
        Logbook(config, 0)


def test_a_refusal_is_reported_in_one_line(wandb, config):
    wandb.refusal = "api key\nnot configured"
    with pytest.raises(TrainingError, match=r"^wandb: api key not configured$"):
        Logbook(config, 0)


def test_it_is_not_imported_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Logbook(TrainConfig(str(tmp_path), DataConfig(("none.tar",))), 0).close()
    assert not (tmp_path / "wandb-id").exists()
