import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdm_models.config import UNetConfig
from mdm_models.pipeline import Pipeline
from mdm_models.training import checkpoint as checkpoints
from mdm_models.training.config import TrainConfig, plan
from mdm_models.training.data import Batch
from mdm_models.training.distributed import Place
from mdm_models.training.errors import CheckpointError, DataError, TrainingError
from mdm_models.training.learner import Learner
from mdm_models.training.trainer import train

IMAGE_MODEL = UNetConfig(
    channels=(32, 32), blocks=(1, 1), attention=(0, 1), mid_blocks=True, num_heads=2, embed_dim=32, context_dim=32
)
CLIP_MODEL = UNetConfig(
    channels=(32, 32, 32), blocks=(1, 1, 1), kind="time", temporal_attention=(0, 1, 0), embed_dim=32, inner=IMAGE_MODEL
)


@pytest.fixture
def config(shard_of, tmp_path: Path) -> TrainConfig:
    """Six steps on four clips of 4 frames of 16², without worker processes."""
    return TrainConfig(
        data=(str(shard_of("a.tar", 4)),), out=str(tmp_path / "run"), model="small", frames=4, size=16, text_width=32,
        text_layers=1, text_tokens=8, batch_size=2, steps=6, lr=1e-3, warmup=2, log_every=2, save_every=3,
        sample_every=0, sample_steps=2, sample_count=2, workers=0,
    )  # fmt: skip


@pytest.fixture
def learner_of(config) -> Callable[..., Learner]:
    def make(model: UNetConfig = CLIP_MODEL, **changes) -> Learner:
        return Learner(dataclasses.replace(config, **changes), model, Place(0, 1, torch.device("cpu")))

    return make


def clips(count: int = 2, frames: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, frames, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(images, ["a cat"] * count, [])


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_averages(run)


def test_a_run_leaves_checkpoints_a_log_events_and_its_settings(config):
    run = train(config, CLIP_MODEL)
    assert [path.name for path in checkpoints.list_steps(run)] == ["step-00000003", "step-00000006"]
    assert [record["step"] for record in records(run)] == [2, 4, 6]
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    assert list((run / "tensorboard").iterdir())


def test_a_record_holds_the_numbers_of_its_interval(config):
    record = records(train(config, CLIP_MODEL))[-1]
    assert record["samples_seen"] == 12
    assert record["epoch"] == 3
    assert record["samples_per_second"] == pytest.approx(2 / record["step_seconds"])
    assert len(record["level_losses"]) == 2


def test_the_averaged_model_of_a_run_can_be_sampled(config):
    run = train(dataclasses.replace(config, steps=1), CLIP_MODEL)
    pipeline = Pipeline.from_pretrained(run / "model")
    averages = weights(run)
    assert all(torch.equal(averages[f"unet.{name}"], value) for name, value in pipeline.model.named_parameters())
    assert all(torch.equal(averages[f"text.{name}"], value) for name, value in pipeline.text_encoder.named_parameters())
    (clip,) = pipeline("a cat", num_inference_steps=1, progress=False)
    assert len(clip.frames) == 4


def test_a_resumed_run_equals_one_that_went_through(config, tmp_path):
    through = train(config, CLIP_MODEL)
    halves = dataclasses.replace(config, out=str(tmp_path / "halves"))
    train(dataclasses.replace(halves, steps=3), CLIP_MODEL)
    run = train(halves, CLIP_MODEL)
    expected, resumed = weights(through), weights(run)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert records(through)[-1]["loss"] == records(run)[-1]["loss"]


def test_a_finished_run_says_so_and_changes_nothing(config, capsys):
    run = train(config, CLIP_MODEL)
    before = (run / "log.jsonl").read_text()
    train(config, CLIP_MODEL)
    assert "6 of 6 steps" in capsys.readouterr().out
    assert (run / "log.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(config, monkeypatch, capsys, number):
    def interrupted(self, *arguments, learn=Learner.learn, **options):
        if self.step == 3:
            os.kill(os.getpid(), number)
        return learn(self, *arguments, **options)

    monkeypatch.setattr(Learner, "learn", interrupted)
    run = train(dataclasses.replace(config, save_every=100), CLIP_MODEL)
    assert [path.name for path in checkpoints.list_steps(run)] == ["step-00000004"]
    assert "4 of 6 steps; the same command goes on" in capsys.readouterr().out
    train(config, CLIP_MODEL)
    assert checkpoints.list_steps(run)[-1].name == "step-00000006"


def test_an_optimizer_setting_can_change_between_runs(config):
    train(dataclasses.replace(config, steps=3), CLIP_MODEL)
    learner = Learner(dataclasses.replace(config, beta1=0.5), CLIP_MODEL, Place(0, 1, torch.device("cpu")))
    learner.resume(Path(config.out))
    [group] = learner.optimizer.param_groups
    assert group["betas"] == (0.5, 0.99)
    assert {int(state["step"]) for state in learner.optimizer.state.values()} == {3}


def test_an_animated_grid_is_drawn_and_is_the_same_after_a_resume(config, tmp_path):
    through = train(dataclasses.replace(config, sample_every=3), CLIP_MODEL)
    halves = dataclasses.replace(config, out=str(tmp_path / "halves"), sample_every=6)
    train(dataclasses.replace(halves, steps=3), CLIP_MODEL)
    train(halves, CLIP_MODEL)
    grid = "samples/step-00000006.webp"
    assert (through / "samples/step-00000003.webp").read_bytes() != (through / grid).read_bytes()
    assert (Path(halves.out) / grid).read_bytes() == (through / grid).read_bytes()


def test_the_loss_falls(learner_of):
    learner = learner_of(lr=3e-3)
    white = Batch(torch.full((8, 3, 4, 16, 16), 255, dtype=torch.uint8), ["white"] * 8, [])
    losses = [learner.learn(white).loss for _ in range(16)]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_the_levels_losses_add_up_to_the_loss(learner_of):
    outcome = learner_of(level_weights=(3.0, 0.5)).learn(clips(), measure_levels=True)
    high, low = outcome.level_losses
    assert 3 * high + 0.5 * low == pytest.approx(outcome.loss, rel=1e-5)


def test_times_of_all_ranks_are_spread_evenly(config):
    times = torch.cat([Learner(config, CLIP_MODEL, Place(0, 1, torch.device("cpu")))._times(8).sort().values])
    gaps = times.diff()
    assert ((gaps >= 124) & (gaps <= 126)).all()
    assert 0 <= times.min() <= times.max() < 1000


def test_warm_up_is_linear(learner_of):
    learner = learner_of(warmup=4, lr=0.4)
    used = [learner.learn(clips()).lr for _ in range(6)]
    assert used == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_bf16_autocast_trains_float32_weights(learner_of):
    learner = learner_of(precision="bf16")
    assert learner.learn(clips()).finite
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}


def test_an_image_model_trains_on_single_frames(learner_of):
    assert learner_of(IMAGE_MODEL, frames=1).learn(clips(frames=1)).finite


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted(learner_of, monkeypatch):
    learner = learner_of(max_bad_steps=3)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    loss = learner.diffusion.per_sample_loss
    monkeypatch.setattr(learner.diffusion, "per_sample_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    learner.learn(clips())
    learner.learn(clips())
    assert (learner.bad_steps, learner.ema.updates, learner.step) == (2, 0, 2)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    with pytest.raises(TrainingError, match="no finite loss in 3 steps"):
        learner.learn(clips())


def test_a_stage_starts_from_the_averages_of_the_one_before(config, learner_of, tmp_path):
    stage = dataclasses.replace(config, frames=1, steps=2, out=str(tmp_path / "stage"))
    averages = weights(train(stage, IMAGE_MODEL))
    learner = learner_of(init_from=stage.out)
    learner.resume(Path(config.out))
    inner = dict(learner.model.unet.inner.named_parameters())
    assert all(torch.equal(inner[name.removeprefix("unet.")], averages[name]) for name in averages if "unet." in name)
    assert torch.equal(learner.model.text.positions, averages["text.positions"])
    assert torch.equal(learner.ema.averages["unet.inner.conv_in.weight"], averages["unet.conv_in.weight"])


def test_a_stage_that_does_not_fit_is_refused(config, learner_of, tmp_path):
    stage = dataclasses.replace(config, steps=2, out=str(tmp_path / "stage"))
    train(stage, CLIP_MODEL)
    with pytest.raises(CheckpointError, match="unet does not fit") as error:
        learner_of(init_from=stage.out).resume(Path(config.out))
    assert "\n" not in str(error.value)


def test_another_models_run_directory_is_refused_and_left_as_it_is(config):
    run = train(dataclasses.replace(config, steps=2), CLIP_MODEL)
    settings = (run / "config.json").read_text()
    wider = dataclasses.replace(CLIP_MODEL, channels=(32, 32, 64))
    with pytest.raises(CheckpointError, match=r"unet\.channels"):
        train(config, wider)
    assert (run / "config.json").read_text() == settings


def test_skipped_samples_are_counted_in_the_log(config, shard_of):
    data = shard_of("b.tar", 2, bad={"mp4": b"", "txt": b"bad"}, mute={"mp4": b""})
    run = train(dataclasses.replace(config, data=(str(data),)), CLIP_MODEL)
    assert records(run)[-1]["skipped"] == {"undecodable": 1, "caption missing": 1}


def test_data_of_bad_samples_only_ends_before_the_first_step(config, shard_of):
    data = shard_of("b.tar", 0, bad={"mp4": b"", "txt": b"bad"})
    with pytest.raises(DataError, match=r"b\.tar"):
        train(dataclasses.replace(config, data=(str(data),)), CLIP_MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 8}, "frames is 8; small works on 4"),
        ({"size": 17}, "size is 17; this model needs a multiple of 2"),
        ({"level_weights": (1.0,)}, "2 levels"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(config, change, message):
    with pytest.raises(TrainingError, match=message):
        plan(dataclasses.replace(config, **change), CLIP_MODEL)


def test_a_model_that_does_not_exist_is_refused(config):
    with pytest.raises(TrainingError, match="mdm_t2v_tyny"):
        plan(dataclasses.replace(config, model="mdm_t2v_tyny"))


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"lr": -1.0}, {"caption_dropout": 1.5}, {"workers": -1}])
def test_settings_out_of_range_are_refused_by_name(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(config, **change)


def test_an_output_directory_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"out: cannot write to .*file/run"):
        train(dataclasses.replace(config, out=str(tmp_path / "file" / "run")), CLIP_MODEL)
