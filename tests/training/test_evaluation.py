import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import split
from mdm_models.errors import DataError, TrainingError
from mdm_models.processes import Processes
from mdm_models.training.checkpoint.checkpoints import list_steps
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.evaluation import Evaluation
from mdm_models.training.learner import Learner
from mdm_models.training.monitor.logbook import EVALUATION, is_logged
from mdm_models.training.trainer import train
from tests.evaluation.conftest import MeanColour, save_scripted
from tests.made_data import encode_image, write_shard
from tests.training.models import LEAST_NESTED_MODEL, settings

HERE = Processes(0, 1, torch.device("cpu"))
SAMPLES = 12


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Half of the pictures held out; the Fréchet distance of mean colours; evaluation every 3 steps of 6."""
    rng = np.random.default_rng(0)
    pictures = {f"p{i}": rng.integers(256, size=(16, 16, 3), dtype=np.uint8) for i in range(SAMPLES)}
    shard = write_shard(
        tmp_path / "data.tar",
        {key: {"png": encode_image(picture), "txt": f"a {key}".encode()} for key, picture in pictures.items()},
    )
    colours = save_scripted(MeanColour(), tmp_path / "colours.pt")
    return changed(
        settings(shard, tmp_path / "run"), frames=1, holdout=0.5, evaluate_every=3, feature_extractor=str(colours)
    )


def evaluation_of(config: TrainConfig) -> Evaluation | None:
    samples = ShardedSamples(open_shards(config.data))
    _, validation = split(samples, config.data.holdout)
    return Evaluation.of(config, SampleReader(samples, config.data), validation, HERE)


@pytest.fixture
def learner(config) -> Learner:
    learner = Learner(config, LEAST_NESTED_MODEL, open_encoder(config.model, 0, HERE.device), HERE)
    with torch.no_grad():
        for average in learner.ema.averages.values():  # the model's output layers begin at 0
            average.normal_(std=0.05)
    return learner


def test_a_run_that_asks_for_none_has_none(config):
    assert evaluation_of(changed(config, evaluate_every=0)) is None


def test_without_held_out_samples_there_is_none_and_a_warning(config):
    with pytest.warns(UserWarning, match=r"no evaluation: no sample is held out of training \(holdout is 0 of 12\)"):
        assert evaluation_of(changed(config, holdout=0)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_extractor": "nowhere.pt"}, "feature extractor nowhere.pt"),
        ({"clip_model": "./nowhere"}, "CLIP model ./nowhere"),
    ],
)
def test_a_network_that_cannot_be_loaded_stops_the_run_before_it_begins(config, change, message):
    with pytest.raises(TrainingError, match=message):
        evaluation_of(changed(config, **change))


def test_the_numbers_are_named(config, learner):
    numbers = evaluation_of(config).measure(learner)
    names = ["evaluated_samples", "validation_loss", "validation_loss_0", "validation_loss_1", "frechet_colours"]
    assert list(numbers) == names
    assert all(math.isfinite(number) for number in numbers.values())
    assert 2 <= numbers["evaluated_samples"] < SAMPLES


def test_the_same_weights_give_the_same_numbers(config, learner):
    evaluation = evaluation_of(config)
    first = evaluation.measure(learner)
    assert evaluation.measure(learner) == first
    assert evaluation_of(config).measure(learner) == first


def test_the_averages_are_evaluated_and_not_what_is_learned(config, learner):
    evaluation = evaluation_of(config)
    first = evaluation.measure(learner)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1)
    assert evaluation.measure(learner) == first
    with torch.no_grad():
        for average in learner.ema.averages.values():
            average.mul_(1.5)
    assert evaluation.measure(learner)["validation_loss"] != first["validation_loss"]


def test_an_evaluation_leaves_no_trace_in_the_learner(config, learner):
    before = {name: parameter.clone() for name, parameter in learner.model.named_parameters()}
    random = torch.get_rng_state()
    evaluation_of(config).measure(learner)
    assert learner.model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], parameter) for name, parameter in learner.model.named_parameters())


def test_the_loss_alone_needs_no_samples(config, learner, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something was sampled")

    monkeypatch.setattr("mdm_models.evaluation.measure._sampled", refuse)
    assert evaluation_of(changed(config, feature_extractor="")).measure(learner)["validation_loss"] > 0


def test_too_few_usable_samples_stop_the_run(config, learner):
    evaluation = evaluation_of(changed(config, evaluate_samples=1))
    with pytest.raises(TrainingError, match="evaluation: 1 of the held-out samples can be used; at least 2 are needed"):
        evaluation.measure(learner)


def test_a_run_logs_its_evaluations(config):
    run = train(config, LEAST_NESTED_MODEL)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "frechet_colours" in record] == [3, 6]


def test_an_evaluation_that_fails_leaves_a_checkpoint_of_what_was_learned(config, monkeypatch):
    def refuse(*_):
        raise DataError("data: DataLoader worker (pid 7) is killed by signal: Killed")

    monkeypatch.setattr(Evaluation, "measure", refuse)
    with pytest.raises(DataError, match="pid 7"):
        train(changed(config, save_every=1000), LEAST_NESTED_MODEL)
    [checkpoint] = list_steps(Path(config.out))
    assert checkpoint.name == "step-00000003"


def test_an_evaluation_before_which_a_run_was_killed_is_made_up_for(config):
    whole = (train(changed(config, out=f"{config.out}-whole"), LEAST_NESTED_MODEL) / "log.jsonl").read_text()
    wanted = [json.loads(line) for line in whole.splitlines() if EVALUATION in line]
    for steps in (3, 6, 6):  # the last one finds a run that has nothing left to learn
        run = train(changed(config, steps=steps), LEAST_NESTED_MODEL)
        assert is_logged(run, steps, EVALUATION)
        lines = (run / "log.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines if EVALUATION in line]
        assert evaluations == [record for record in wanted if record["step"] <= steps]
        (run / "log.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line) != evaluations[-1]))
