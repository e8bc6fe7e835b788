"""Data and settings that change between two parts of a run, or under it, are noticed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from mdm_models.data import stream
from mdm_models.data.fingerprint import Watch, changes, record_of
from mdm_models.data.shard_index import scan
from mdm_models.data.shards import ShardedSamples
from mdm_models.errors import CheckpointError, DataError, TrainingError
from mdm_models.text import ClassLabels, EncoderIdentity
from mdm_models.training import trainer
from mdm_models.training.checkpoint.checkpoints import list_steps
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.settings import differences, record_of_run
from mdm_models.training.trainer import train
from tests.made_data import encode_image, write_shard
from tests.training.models import LEAST_MODEL, settings


def shard(path: Path, first: int = 0, count: int = 4) -> Path:
    """Pictures of noise."""
    draw = np.random.default_rng(first)
    noise = {f"p{i}": draw.integers(256, size=(16, 16, 3), dtype=np.uint8) for i in range(first, first + count)}
    return write_shard(path, {key: {"png": encode_image(p), "txt": key.encode()} for key, p in noise.items()})


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """Six steps on two shards."""
    (tmp_path / "data").mkdir()
    shard(tmp_path / "data" / "0.tar", 0)
    shard(tmp_path / "data" / "1.tar", 10)
    return changed(settings(tmp_path / "data", tmp_path / "run"), frames=1, save_every=2)


@pytest.fixture
def begun(config) -> TrainConfig:
    """Two of the steps are made."""
    train(changed(config, steps=2), LEAST_MODEL)
    return config


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: scan(str(path)).bounds[3]])


def overwrite(path: Path) -> None:
    shard(path, 20)


def same_names(path: Path) -> None:
    """Other pictures of the same size, keys and time."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[600:700] = bytes(100)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# Between two parts of a run


def test_a_run_goes_on_without_a_word_where_nothing_changed(begun, tmp_path, recwarn):
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    train(changed(begun, shards=(str(moved),), workers=1, log_every=3), LEAST_MODEL)
    assert not [warning for warning in recwarn if "since checkpoint" in str(warning.message)]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("seed", 1, "seed was 0, is 1"),
        ("lr", 0.1, "lr was 0.001, is 0.1"),
        ("batch_size", 4, "batch_size was 2, is 4"),
        ("holdout", 0.2, "holdout was 0, is 0.2"),
        ("loss_target", "v", "loss_target was eps, is v"),
        ("caption_dropout", 0.5, "caption_dropout was 0.1, is 0.5"),
    ],
)
def test_another_setting_is_named_and_refused_until_it_is_accepted(begun, setting, value, said):
    other = changed(begun, **{setting: value}, steps=3)
    with pytest.raises(CheckpointError, match=f"other data or settings: {said}; .*--accept-changes"):
        train(other, LEAST_MODEL)
    with pytest.warns(UserWarning, match=said):
        train(changed(other, accept_changes=True), LEAST_MODEL)
    train(changed(other, steps=4), LEAST_MODEL)  # from here on that is how the run is


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "shard .*1.tar is missing"),
        (overwrite, "shard .*1.tar is another: it had 4 samples, it has 4"),
        (same_names, "shard .*1.tar is another"),
        (cut, "shard .*1.tar is another: it had 4 samples, it has 3"),
    ],
    ids=["deleted", "overwritten", "changed inside", "truncated"],
)
def test_other_data_are_named_and_refused(begun, tmp_path, change, said):
    change(tmp_path / "data" / "1.tar")
    with pytest.raises(CheckpointError, match=said):
        train(begun, LEAST_MODEL)


def test_more_shards_are_told(begun, tmp_path):
    shard(tmp_path / "data" / "2.tar", 20)
    with pytest.warns(UserWarning, match=r"1 shards are new, .*2.tar among them"):
        train(changed(begun, steps=3), LEAST_MODEL)


def test_shards_in_another_order_are_refused(begun, tmp_path):
    backwards = tuple(f"{tmp_path}/data/{i}.tar" for i in (1, 0))
    with pytest.raises(CheckpointError, match="the shards are in another order"):
        train(changed(begun, shards=backwards), LEAST_MODEL)


def test_a_checkpoint_without_a_record_is_gone_on_from_with_a_notice(begun):
    [path] = list_steps(Path(begun.out))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("record")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="has no record of its data and settings"):
        train(changed(begun, lr=0.1, steps=3), LEAST_MODEL)


def test_a_shard_out_of_reach_is_no_other_one(config, tmp_path):
    here = [record_of(scan(f"{tmp_path}/data/{i}.tar")) for i in (0, 1)]
    away = type(here[1])(here[1].name, "", 0)
    assert changes(here, [here[0], away]) == ([], [])
    assert changes([here[0], away], here) == ([], [])


def test_other_names_of_classes_are_other_settings(config):
    records = [record_of_run(config, ClassLabels(names), [], {}) for names in (["a", "b"], ["b", "a"])]
    [said], _ = differences(*records)
    assert said.startswith("text_encoder was 2 classes")


def test_another_tokenizer_is_another_setting_where_both_are_known(config):
    class Reads(ClassLabels):
        def __init__(self, tokenizer: str):
            super().__init__(["a", "b"])
            self.identity = EncoderIdentity("t5", 4, 8, "weights", tokenizer)

    before, now, unknown = (record_of_run(config, Reads(name), [], {}) for name in ("one", "two", ""))
    assert differences(before, now)[0] == ["tokenizer was one, is two"]
    assert differences(before, unknown)[0] == differences(unknown, now)[0] == []


def test_how_it_is_computed_is_told_and_not_refused(begun):
    with pytest.warns(UserWarning, match="arithmetic was float32, is bf16; samples at once in a process was 2, is 1"):
        train(changed(begun, precision="bf16", micro_batch=1, steps=3), LEAST_MODEL)


# Under a run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "1 of 2 shards are gone since the run began, as .*1.tar"),
        (overwrite, "shard .*1.tar was changed while the run read it"),
        (cut, "shard .*1.tar was changed while the run read it"),
    ],
    ids=["deleted", "overwritten", "truncated"],
)
def test_data_that_change_under_a_run_end_it_with_a_checkpoint(config, tmp_path, monkeypatch, change, said):
    learn = trainer.Learner.learn

    def learn_and_change(learner, *chunks, **how):
        if learner.step == 2:
            change(tmp_path / "data" / "1.tar")
        return learn(learner, *chunks, **how)

    monkeypatch.setattr(trainer.Learner, "learn", learn_and_change)
    with pytest.raises(DataError, match=said):
        train(config, LEAST_MODEL)
    assert list_steps(Path(config.out))[-1].name == "step-00000004"


def test_a_shard_that_was_only_touched_is_the_same_whatever_time_it_has(config, tmp_path):
    path = tmp_path / "data" / "0.tar"
    found = scan(str(path))
    watch = Watch([found], [record_of(found)], 0.0)
    os.utime(path, ns=(1, 1))
    watch.check()
    same_names(path)  # which sets its time back
    with pytest.raises(DataError, match="was changed"):
        watch.check()


def test_a_sample_is_not_read_from_a_shard_that_was_cut(config, tmp_path):
    path = tmp_path / "data" / "0.tar"
    samples = ShardedSamples([scan(str(path))])
    cut(path)
    with pytest.raises(OSError, match=r"it has \d+ bytes, not the \d+ as when its samples were found"):
        samples[0]


# Processes and disks that fail


def test_a_process_that_decodes_and_is_killed_ends_the_run_with_a_checkpoint(config, monkeypatch):
    class Dying(stream.Positions):
        def __getitem__(self, position):
            if position >= 8:
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
            return super().__getitem__(position)

    monkeypatch.setattr(stream, "Positions", Dying)
    with pytest.raises(DataError, match=r"data: DataLoader worker .*fewer --workers"):
        train(changed(config, workers=1, steps=40), LEAST_MODEL)
    assert int(list_steps(Path(config.out))[-1].name.removeprefix("step-")) >= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_ends_the_run_with_a_checkpoint(config, monkeypatch, workers):
    class Failing(stream.Positions):
        def __getitem__(self, position):
            if position >= 4:
                raise OSError(5, "Input/output error", "/mnt/data")
            return super().__getitem__(position)

    monkeypatch.setattr(stream, "Positions", Failing)
    with pytest.raises(TrainingError, match="Input/output error") as ended:
        train(changed(config, workers=workers), LEAST_MODEL)
    assert "\n" not in str(ended.value)
    assert list_steps(Path(config.out))[-1].name == "step-00000002"


def test_a_lost_mount_ends_the_run_with_a_checkpoint(config, tmp_path, monkeypatch):
    learn = trainer.Learner.learn

    def learn_and_lose(learner, *chunks, **how):
        if learner.step == 2:
            (tmp_path / "data").rename(tmp_path / "away")
        return learn(learner, *chunks, **how)

    monkeypatch.setattr(trainer.Learner, "learn", learn_and_lose)
    with pytest.raises(DataError, match=r"shards are gone|samples in a row cannot be used"):
        train(changed(config, save_every=100), LEAST_MODEL)
    assert int(list_steps(Path(config.out))[-1].name.removeprefix("step-")) >= 3
