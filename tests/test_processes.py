import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mdm_models
from mdm_models.errors import DataError, TrainingError
from mdm_models.processes import ALONE, RESTARTS, Processes, init_process_group
from tests import forked


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="there is no GPU here"), init_process_group("cuda"):
        pass


def test_a_device_of_no_kind_is_not_taken_for_the_cpu():
    with pytest.raises(TrainingError, match="device is 'gpu'; it must be auto, cpu or cuda"), init_process_group("gpu"):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(TrainingError, match="4 processes on this machine and 2 GPUs"), init_process_group("auto"):
        pass


def test_one_process_agrees_with_itself():
    assert ALONE.agree(lambda: "done") == ["done"]
    assert ALONE.gather([1, 2]) == [1, 2]
    with pytest.raises(DataError, match="no shard"):
        ALONE.agree(lambda: _refuse())


def _refuse() -> None:
    raise DataError("no shard")


def _agree(rank: int, folder: str) -> None:
    """What each of two processes finds, written to a file of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"))
    found = [processes.agree(lambda: rank), processes.gather([rank] * rank), processes.apart().agree(lambda: -rank)]
    try:
        processes.agree(lambda: _refuse() if rank == 1 else None)
    except DataError as error:
        found.append(str(error))
    Path(folder, str(rank)).write_text(repr(found))
    dist.destroy_process_group()


def test_processes_agree_on_results_and_on_errors(tmp_path):
    assert forked.run_together(_agree, (0, str(tmp_path)), (1, str(tmp_path))) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [repr([[0, 1], [1], [0, -1], "no shard"])] * 2


def test_there_is_one_way_to_agree():
    """Collectives are called in processes.py alone, where an error on one process is raised on all."""
    files = Path(mdm_models.__file__).parent.rglob("*.py")
    assert [f.name for f in files if "dist.all_" in f.read_text() or "new_group(" in f.read_text()] == ["processes.py"]


@pytest.mark.parametrize(("shared", "restarts"), [("True", "1"), ("False", "1"), ("True", "0")])
def test_restarts_that_would_fail_are_warned_of_at_the_start(monkeypatch, shared, restarts):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": restarts}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    fails = shared == "True" and restarts != "0"
    with warnings.catch_warnings(record=True) as found, init_process_group("cpu"):
        pass
    assert [str(warning.message) for warning in found] == [RESTARTS] * fails


def test_alone_nobody_is_asked_whether_a_flag_is_set():
    alone = Processes(0, 1, torch.device("meta"))  # which has no values to read
    assert alone.any(True)
    assert not alone.any(False)
