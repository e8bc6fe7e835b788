import json
import os
import pickle
import resource
import shutil
import signal
from concurrent.futures import wait

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mdm_models.errors import CheckpointError
from mdm_models.processes import Processes
from mdm_models.training.checkpoint.checkpoints import Checkpoints, list_steps, load_averages, verified_manifest
from mdm_models.training.checkpoint.files import SafeReader, measured
from mdm_models.training.checkpoint.staging import _owners, staged

IDENTITY = {"name": "small", "unet": {"channels": (32, 64), "inner": {"channels": (32,)}, "pairs": ((1, 2),)}}
ALONE = Processes(0, 1, torch.device("cpu"))


def state(step: int) -> dict:
    """A state like that of a run, all of it a function of `step`."""
    generator = torch.Generator().manual_seed(step)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=step / 1000)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {
        "model": model.state_dict() | {"half": torch.randn(5, generator=generator).bfloat16()},
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "ema": {name: parameter.detach() + 1 for name, parameter in model.named_parameters()},
        "counters": {"step": step, "samples_seen": 8 * step},
    }


def same(ours, theirs) -> bool:
    """Whether two states have the same entries, of the same dtypes and values."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def checkpoints(run, keep: int = 3, identity: dict = IDENTITY) -> Checkpoints:
    return Checkpoints(run, identity, keep, ALONE)


def save(run, *steps: int, keep: int = 3):
    """Save these steps one after the other; → the last one's directory."""
    of_run = checkpoints(run, keep)
    for step in steps:
        of_run.save(step, state(step))
    of_run.finish()
    return list_steps(run)[-1]


def loaded_step(run) -> int:
    """The step that a run continues from, everything of which must be as it was saved."""
    loaded = state(0)
    assert checkpoints(run).load_newest(loaded)
    step = loaded["counters"]["step"]
    assert same(loaded, state(step))
    return step


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path, 7)
    assert loaded_step(tmp_path) == 7


def test_tensors_are_filled_in_place(tmp_path):
    save(tmp_path, 7)
    loaded = state(0)
    weight, moment = loaded["model"]["0.weight"], loaded["optimizer"]["state"]["0.weight"]["exp_avg"]
    checkpoints(tmp_path).load_newest(loaded)
    assert torch.equal(weight, state(7)["model"]["0.weight"])
    assert torch.equal(moment, state(7)["optimizer"]["state"]["0.weight"]["exp_avg"])
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_happens_to_the_state_after_save_returns_is_not_saved(tmp_path):
    of_run, changing = checkpoints(tmp_path), state(7)
    of_run.save(7, changing)
    changing["counters"]["step"] = 8
    for part in ("model", "ema"):
        for tensor in changing[part].values():
            tensor.zero_()
    of_run.finish()
    assert loaded_step(tmp_path) == 7


def test_a_fresh_run_has_no_checkpoint(tmp_path):
    untouched = state(1)
    assert not checkpoints(tmp_path / "new").load_newest(untouched)
    assert same(untouched, state(1))


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 8, 9, 10, 100, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]


def test_steps_of_more_than_eight_digits_come_after_the_others(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000, keep=2)
    assert loaded_step(tmp_path) == 100_000_000


def test_a_step_that_is_on_the_disk_is_not_written_again(tmp_path):
    before = save(tmp_path, 3).stat().st_ino
    resumed = checkpoints(tmp_path)
    resumed.load_newest(state(0))
    resumed.save(3, state(3))
    resumed.finish()
    assert list_steps(tmp_path)[-1].stat().st_ino == before


def test_leftovers_of_a_killed_process_are_never_picked_and_later_removed(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".partial-step-00000002"
    half.mkdir()
    (half / "__3_0.distcp").write_bytes(b"half")
    assert loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert not (list_steps(tmp_path)[-1] / "__3_0.distcp").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_end(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    save(run, 1, 2)
    return run


@pytest.mark.parametrize("damage", [cut, flip_end, lambda path: path.unlink()], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_it_loaded(two_saved, tmp_path, damage, name):
    run = shutil.copytree(two_saved, tmp_path / "run")
    damage(list_steps(run)[-1] / name)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged.*" + name.strip("_.")):
        assert loaded_step(run) == 1


def test_one_changed_bit_amid_the_weights_is_noticed(two_saved, tmp_path):
    run = shutil.copytree(two_saved, tmp_path / "run")
    flip(list_steps(run)[-1] / "__0_0.distcp")
    with pytest.warns(UserWarning, match="has another checksum"):
        assert loaded_step(run) == 1


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    cut(save(tmp_path, 1, 2) / "__0_0.distcp")
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


def test_a_damaged_one_of_a_later_step_does_not_count_among_those_kept(tmp_path):
    cut(save(tmp_path, 1, 3) / "__0_0.distcp")
    save(tmp_path, 2, keep=1)
    with pytest.warns(UserWarning, match="step-00000003"):
        assert loaded_step(tmp_path) == 2


def test_a_run_with_only_damaged_ones_does_not_start_over(tmp_path):
    cut(save(tmp_path, 1) / "__0_0.distcp")
    with pytest.warns(UserWarning, match="__0_0"), pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoints(tmp_path).load_newest(state(0))


def test_a_checkpoint_of_another_model_is_refused_naming_both(tmp_path):
    save(tmp_path, 1)
    other = {"name": "large", "unet": IDENTITY["unet"] | {"inner": {"channels": [64]}}}
    with pytest.raises(CheckpointError, match=r"small.*large.*unet\.inner\.channels is \[32\] there, \[64\] here") as e:
        checkpoints(tmp_path, identity=other).load_newest(state(0))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", ["new", "gone"])
def test_a_state_of_other_entries_is_refused_naming_one(two_saved, change):
    differing = state(0)
    if change == "new":
        differing["ema"]["more"] = torch.zeros(1)
    else:
        differing["ema"]["more"] = differing["ema"].pop("1.bias")
    with pytest.raises(CheckpointError, match=r"step-00000002.* does not fit: ema\.(more|1\.bias)") as error:
        checkpoints(two_saved).load_newest(differing)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_an_earlier_version_is_refused_saying_what_to_do(tmp_path):
    old = tmp_path / "checkpoints" / "step-00000001"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text(json.dumps({"model": IDENTITY, "files": {"model.safetensors": [0, 0]}}))
    with pytest.raises(CheckpointError, match=r"earlier version.*choose another output directory"):
        checkpoints(tmp_path).load_newest(state(0))


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def reseal(path):
    """Make a manifest that fits the files, as one who hands out a checkpoint can."""
    manifest = path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] = {name: measured(path / name) for name in content["files"]}
    manifest.write_text(json.dumps(content))


def test_metadata_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    path = save(tmp_path / "run", 1)
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "victim")))
    reseal(path)
    for read in (lambda: checkpoints(tmp_path / "run").load_newest(state(0)), lambda: load_averages(tmp_path / "run")):
        with pytest.raises(CheckpointError, match=r"metadata cannot be read.*posix\.mkdir"):
            read()
    assert not (tmp_path / "victim").exists()


def test_a_value_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    of_run, bad = checkpoints(tmp_path / "run"), state(1)
    bad["counters"]["step"] = Malicious(tmp_path / "victim")
    of_run._write(1, dict(staged({"model": bad["model"]}, 0, 1)) | {"counters.step": bad["counters"]["step"]})
    with pytest.raises(CheckpointError, match="does not fit"):
        of_run.load_newest({"model": state(0)["model"], "counters": {"step": 0}})
    assert not (tmp_path / "victim").exists()


def test_metadata_that_points_outside_its_folder_is_refused(tmp_path):
    path = save(tmp_path, 1)
    metadata = SafeReader(path).metadata
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoints(tmp_path).load_newest(state(0))


@pytest.fixture
def small_disk():
    """Called with a number of bytes, beyond which no file may grow from then on: it fails as a full disk does but for
    the error's number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_loses_nothing_saved(tmp_path, small_disk):
    save(tmp_path, 1, 2, keep=1)
    small_disk(100)
    with pytest.raises(
        CheckpointError, match=r"step-00000003 cannot be written \(.*too large.*last one saved is .*step-00000002"
    ) as error:
        save(tmp_path, 3, keep=1)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000002"]
    assert loaded_step(tmp_path) == 2


def test_a_disk_that_is_full_within_a_tensor_is_said_to_be_full(tmp_path, small_disk):
    small_disk(100_000)
    large = state(1)
    large["model"]["large"] = torch.zeros(1_000_000)
    run = checkpoints(tmp_path)
    run.save(1, large)
    with pytest.raises(CheckpointError, match=r"cannot be written \(\[Errno 27\] File too large\)"):
        run.finish()


def test_a_failed_save_is_known_before_the_next_one(tmp_path, small_disk):
    of_run = checkpoints(tmp_path)
    of_run.save(1, state(1))
    of_run.finish()
    assert not of_run.failed
    small_disk(100)
    of_run.save(2, state(2))
    wait([of_run._saving])
    assert of_run.failed
    with pytest.raises(CheckpointError, match="cannot be written"):
        of_run.save(3, state(3))
    assert not of_run.failed  # told once


def test_a_directory_that_cannot_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Not a directory.*none was saved before") as error:
        save(tmp_path / "file", 1)
    assert "\n" not in str(error.value)


def test_a_directory_that_vanishes_while_it_is_written_is_a_clear_error(tmp_path, monkeypatch):
    save(tmp_path, 1)
    doomed = checkpoints(tmp_path)
    settle = doomed._settle
    monkeypatch.setattr(doomed, "_settle", lambda partial, names: (shutil.rmtree(partial), settle(partial, names))[1])
    doomed.save(2, state(2))
    with pytest.raises(CheckpointError, match=r"cannot be written.*No such file.*last one saved is .*step-00000001"):
        doomed.finish()


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750


def test_the_averages_of_a_run_can_be_taken_over(tmp_path):
    save(tmp_path, 1)
    assert same(load_averages(tmp_path), state(1)["ema"])


def test_averages_come_from_the_newest_that_is_whole(two_saved, tmp_path):
    run = shutil.copytree(two_saved, tmp_path / "run")
    cut(list_steps(run)[-1] / "__0_0.distcp")
    with pytest.warns(UserWarning, match="step-00000002"):
        assert same(load_averages(run), state(1)["ema"])


def test_averages_of_a_run_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_averages(tmp_path)


def test_the_manifest_says_which_model_it_is(two_saved):
    assert verified_manifest(list_steps(two_saved)[-1])["model"]["name"] == "small"


def test_processes_copy_each_tensor_once_and_about_as_much_as_each_other():
    whole = state(1)
    shares = [staged(whole, rank, 3) for rank in range(3)]
    everything = staged(whole, 0, 1)
    assert sorted(name for share in shares for name in share) == sorted(everything)
    sizes = {name: value.nbytes for name, value in everything.items() if isinstance(value, torch.Tensor)}
    loads = [sum(sizes.get(name, 0) for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_the_largest_tensors_are_dealt_first():
    assert _owners({"a": 1, "b": 5, "c": 4, "d": 2}, 2) == {"b": 0, "c": 1, "d": 1, "a": 0}
