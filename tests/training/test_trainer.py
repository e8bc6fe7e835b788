import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models.errors import CheckpointError, DataError, TrainingError
from mdm_models.pipeline import Pipeline
from mdm_models.training.checkpoint import checkpoints
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.learner import Learner
from mdm_models.training.trainer import train, train_whole
from tests.made_data import encode_image, write_shard
from tests.training.models import LEAST_CLIP_MODEL, LEAST_MODEL, LEAST_NESTED_MODEL, settings


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    """Four pictures."""
    rng = np.random.default_rng(0)
    pictures = {key: encode_image(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for key in "abcd"}
    return write_shard(
        tmp_path_factory.mktemp("data") / "a.tar",
        {key: {"png": picture, "txt": key.encode()} for key, picture in pictures.items()},
    )


@pytest.fixture
def config(shard, tmp_path: Path) -> TrainConfig:
    """Six steps on four pictures, with a checkpoint after three."""
    return changed(settings(shard, tmp_path / "run"), frames=1)


@pytest.fixture(scope="module")
def finished(shard, tmp_path_factory) -> TrainConfig:
    """The settings of a run that went through such six steps and drew two grids; nothing may change it."""
    config = changed(settings(shard, tmp_path_factory.mktemp("finished") / "run"), frames=1, sample_every=3)
    train(config, LEAST_NESTED_MODEL)
    return config


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory) -> Path:
    """A run that was stopped after three steps and went on."""
    config = changed(finished, out=str(tmp_path_factory.mktemp("resumed") / "run"))
    train(changed(config, steps=3), LEAST_NESTED_MODEL)
    return train(config, LEAST_NESTED_MODEL)


def records(run: Path, kind: str = "training") -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_averages(run)


def test_a_run_leaves_checkpoints_a_log_events_and_its_settings(finished):
    run = Path(finished.out)
    assert [path.name for path in checkpoints.list_steps(run)] == ["step-00000003", "step-00000006"]
    assert [record["step"] for record in records(run)] == [2, 4, 6]
    assert json.loads((run / "config.json").read_text())["optimizer"]["steps"] == 6
    assert list((run / "tensorboard").iterdir())


def test_a_record_holds_the_numbers_of_its_interval(finished):
    record = records(Path(finished.out))[-1]
    assert record["samples_seen"] == 12
    assert record["epoch"] == 3
    assert record["samples_per_second"] == pytest.approx(2 / record["step_seconds"])
    assert record["mfu"] > 0
    assert len(record["level_losses"]) == 2


def test_the_averaged_model_of_a_run_can_be_sampled(shard_of, tmp_path):
    run = train(changed(settings(shard_of("a.tar", 4), tmp_path / "run"), steps=1), LEAST_CLIP_MODEL)
    pipeline = Pipeline.from_pretrained(run / "model")
    averages = weights(run)
    assert all(torch.equal(averages[f"unet.{name}"], value) for name, value in pipeline.model.named_parameters())
    assert all(torch.equal(averages[f"text.{name}"], value) for name, value in pipeline.text_encoder.named_parameters())
    (clip,) = pipeline("a cat", num_inference_steps=1, progress=False)
    assert len(clip.frames) == 4


def test_a_resumed_run_equals_one_that_went_through(finished, resumed):
    through = Path(finished.out)
    expected, found = weights(through), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(through)[-1]["loss"] == records(resumed)[-1]["loss"]


def test_a_run_on_clips_and_pictures_resumes_exactly(shard, shard_of, tmp_path):
    config = changed(settings(shard_of("c.tar", 3), tmp_path / "through"), images=(str(shard),), image_share=0.5)
    through = train(changed(config, batch_size=4), LEAST_CLIP_MODEL)
    halves = changed(config, batch_size=4, out=str(tmp_path / "halves"))
    train(changed(halves, steps=3), LEAST_CLIP_MODEL)
    expected, found = weights(through), weights(train(halves, LEAST_CLIP_MODEL))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(through)[-1]["epoch"] == 4  # of the clips
    with pytest.raises(CheckpointError, match=r"image_share was 0.5, is 0.25"):
        train(changed(halves, image_share=0.25), LEAST_CLIP_MODEL)


def test_a_grid_is_drawn_and_is_the_same_after_a_resume(finished, resumed):
    grids = [Path(finished.out) / f"samples/step-0000000{step}.webp" for step in (3, 6)]
    assert grids[0].read_bytes() != grids[1].read_bytes()
    assert (resumed / "samples" / grids[1].name).read_bytes() == grids[1].read_bytes()


def test_a_run_with_power_averages_keeps_snapshots_and_resumes(config, tmp_path):
    power = changed(config, ema_stds=(0.1, 0.2), ema_snapshot_every=2)
    through = train(power, LEAST_NESTED_MODEL)
    halves = changed(power, out=str(tmp_path / "halves"))
    train(changed(halves, steps=3), LEAST_NESTED_MODEL)
    run = train(halves, LEAST_NESTED_MODEL)
    snapshots = [path.name for path in sorted((through / "averages").iterdir())]
    assert snapshots == [f"step-0000000{step}.safetensors" for step in (2, 4, 6)]
    for name in snapshots[1:]:
        assert (run / "averages" / name).read_bytes() == (through / "averages" / name).read_bytes()


def test_a_finished_run_says_so_and_changes_nothing(finished, capsys):
    run = Path(finished.out)
    before = (run / "log.jsonl").read_text()
    train(finished, LEAST_NESTED_MODEL)
    assert "6 of 6 steps" in capsys.readouterr().out
    assert (run / "log.jsonl").read_text() == before


def test_a_run_killed_after_its_last_step_still_gets_its_model(config):
    run = train(changed(config, steps=1), LEAST_NESTED_MODEL)
    (run / "model" / "pipeline.json").unlink()  # the file that is written last
    train(changed(config, steps=1), LEAST_NESTED_MODEL)
    Pipeline.from_pretrained(run / "model")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU])
def test_a_signal_saves_and_stops_and_the_run_goes_on(config, monkeypatch, capsys, number):
    def interrupted(self, *arguments, learn=Learner.learn, **options):
        if self.step == 3:
            os.kill(os.getpid(), number)
        return learn(self, *arguments, **options)

    monkeypatch.setattr(Learner, "learn", interrupted)
    run = train(changed(config, save_every=100), LEAST_NESTED_MODEL)
    assert [path.name for path in checkpoints.list_steps(run)] == ["step-00000004"]
    assert "4 of 6 steps; the same command goes on" in capsys.readouterr().out
    train(config, LEAST_NESTED_MODEL)
    assert checkpoints.list_steps(run)[-1].name == "step-00000006"


def test_what_is_longer_than_a_run_stops_with_it(config, monkeypatch):
    def interrupted(self, *arguments, learn=Learner.learn, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_whole(config, LEAST_NESTED_MODEL)
    assert train_whole(changed(config, steps=2), LEAST_NESTED_MODEL) == Path(config.out)


@pytest.mark.parametrize("levels_between", [0, 1])
def test_a_stage_starts_from_the_averages_of_the_one_before(config, tmp_path, monkeypatch, levels_between):
    """Also where that one is nested in one that is nested in this one."""
    around = LEAST_NESTED_MODEL
    for _ in range(levels_between):
        around = dataclasses.replace(LEAST_NESTED_MODEL, inner=around)
    prefix = "unet." + "inner." * (levels_between + 1)
    config = changed(config, size=config.data.size * 2**levels_between)
    stage = changed(config, steps=1, out=str(tmp_path / "stage"))
    averages = {name: value for name, value in weights(train(stage, LEAST_MODEL)).items() if "." in name}
    begun = {}

    def learn(self, *arguments, learn=Learner.learn, **options):
        begun.update({name: value.clone() for name, value in self.model.state_dict().items()})
        begun.update({f"ema.{name}": value.clone() for name, value in self.ema.averages.items()})
        return learn(self, *arguments, **options)

    monkeypatch.setattr(Learner, "learn", learn)
    train(changed(config, steps=1, init_from=stage.out), around)
    for name, value in averages.items():
        own = name.replace("unet.", prefix)
        assert torch.equal(begun[own], value)
        assert torch.equal(begun[f"ema.{own}"], value)


def test_a_stage_that_does_not_fit_is_refused(config, finished):
    with pytest.raises(CheckpointError, match=r"unet does not fit: .* there, .* here") as error:
        train(changed(config, init_from=finished.out), LEAST_NESTED_MODEL)
    assert "\n" not in str(error.value)


def test_another_models_run_directory_is_refused_and_left_as_it_is(finished):
    config = Path(finished.out) / "config.json"
    before = config.read_text()
    wider = dataclasses.replace(LEAST_NESTED_MODEL, channels=(32,))
    with pytest.raises(CheckpointError, match=r"unet\.channels"):
        train(changed(finished, steps=9), wider)
    assert config.read_text() == before


def test_skipped_samples_are_counted_in_the_log(config, pictures_of):
    data = pictures_of("b.tar", 2, bad={"png": b"", "txt": b"bad"}, mute={"png": b""})
    run = train(changed(config, shards=(str(data),), max_bad_share=1.0), LEAST_NESTED_MODEL)
    assert records(run)[-1]["skipped"] == {"undecodable": 1, "caption missing": 1}


def test_data_of_bad_samples_only_ends_before_the_first_step(config, pictures_of):
    data = pictures_of("b.tar", 0, bad={"png": b"", "txt": b"bad"})
    with pytest.raises(DataError, match=r"b\.tar"):
        train(changed(config, shards=(str(data),)), LEAST_NESTED_MODEL)


def test_an_output_directory_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"out: cannot write to .*file/run"):
        train(changed(config, out=str(tmp_path / "file" / "run")), LEAST_NESTED_MODEL)
