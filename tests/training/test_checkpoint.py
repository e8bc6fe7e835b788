import json
import resource
import signal

import pytest
import torch

from mdm_models.training import checkpoint as checkpoints
from mdm_models.training.checkpoint import Checkpoint
from mdm_models.training.errors import CheckpointError

IDENTITY = {"name": "small", "unet": {"channels": (32, 64), "inner": {"channels": (32,)}}}


def state(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return Checkpoint(
        model={"conv.weight": conv, "half": torch.randn(5, generator=generator).bfloat16()},
        ema={"conv.weight": conv + 1},
        optimizer={"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        counters={"step": step, "samples_seen": 8 * step},
    )


def save(run, step: int, keep: int = 3):
    return checkpoints.save(run, state(step), IDENTITY, keep)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path, 7)
    loaded, saved = checkpoints.load_newest(tmp_path, IDENTITY), state(7)
    assert loaded.counters == saved.counters
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    for ours, theirs in ((loaded.model, saved.model), (loaded.ema, saved.ema)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_a_fresh_run_has_no_checkpoint(tmp_path):
    assert checkpoints.load_newest(tmp_path / "new", IDENTITY) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints.list_steps(tmp_path)] == ["step-00000010", "step-00000100"]


def test_a_half_written_one_is_never_picked_and_later_removed(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".partial-00000002"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoints.load_newest(tmp_path, IDENTITY).counters["step"] == 1
    save(tmp_path, 3)
    assert not half.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_it_loaded(tmp_path, damage, name):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    with pytest.warns(UserWarning, match="step-00000002"):
        assert checkpoints.load_newest(tmp_path, IDENTITY).counters["step"] == 1


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    cut(save(tmp_path, 2) / "optimizer.pt")
    save(tmp_path, 2)
    assert checkpoints.load_newest(tmp_path, IDENTITY).counters["step"] == 2


def test_a_run_with_only_damaged_ones_does_not_start_over(tmp_path):
    cut(save(tmp_path, 1) / "ema.safetensors")
    with pytest.warns(UserWarning, match="ema"), pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints.load_newest(tmp_path, IDENTITY)


def test_a_checkpoint_of_another_model_is_refused_naming_both(tmp_path):
    save(tmp_path, 1)
    other = {"name": "large", "unet": {"channels": [32, 64], "inner": {"channels": [64]}}}
    with pytest.raises(
        CheckpointError, match=r"small.*large.*unet\.inner\.channels is \[32\] there, \[64\] here"
    ) as error:
        checkpoints.load_newest(tmp_path, other)
    assert "\n" not in str(error.value)


def test_a_full_disk_loses_nothing_saved(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # no file may grow beyond 100 bytes
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000002 cannot be written.*last one saved is .*step-00000001"
        ):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoints.load_newest(tmp_path, IDENTITY).counters["step"] == 1


def test_a_directory_that_cannot_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="none was saved before") as error:
        save(tmp_path / "file", 1)
    assert "\n" not in str(error.value)


def test_the_averages_of_a_run_can_be_taken_over(tmp_path):
    save(tmp_path, 1)
    assert torch.equal(checkpoints.load_averages(tmp_path)["conv.weight"], state(1).ema["conv.weight"])


def test_averages_of_a_run_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.load_averages(tmp_path)


def test_the_manifest_says_which_model_it_is(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert manifest["model"]["name"] == "small"
