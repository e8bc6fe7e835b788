import gzip
import json
from pathlib import Path

import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.processes import Processes
from mdm_models.training.config import OutputConfig, TrainConfig
from mdm_models.training.monitor.profiler import profiling

CPU = torch.device("cpu")


def run_steps(run: Path, count: int, *, profile: bool = True, rank: int = 0) -> Path:
    """Steps that each multiply matrices of a size of their own; → the profile's folder."""
    config = TrainConfig(str(run), DataConfig(("none.tar",)), output=OutputConfig(profile=profile))
    with profiling(config, run, Processes(rank, rank + 1, CPU)) as profiler:
        for step in range(1, count + 1):
            torch.mm(torch.zeros(step, 3), torch.zeros(3, step))
            profiler.step()
    return run / "profile"


def multiplied(folder: Path) -> list[int]:
    """The steps whose product is in the trace."""
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    return sorted(event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm")


def test_the_trace_holds_steps_6_to_8(tmp_path):
    assert multiplied(run_steps(tmp_path, 12)) == [6, 7, 8]


def test_a_table_names_the_costliest_ops(tmp_path):
    assert "aten::mm" in (run_steps(tmp_path, 8) / "table.txt").read_text()


def test_a_run_that_ends_early_keeps_what_it_traced(tmp_path):
    assert multiplied(run_steps(tmp_path, 7)) == [6, 7]


def test_a_run_that_ends_before_the_trace_says_so(tmp_path, capsys):
    assert not run_steps(tmp_path, 5).exists()
    assert "no trace" in capsys.readouterr().out


@pytest.mark.parametrize("where", [{"profile": False}, {"rank": 1}])
def test_nothing_is_written_unless_asked_for_by_the_leading_process(tmp_path, where):
    assert not run_steps(tmp_path, 9, **where).exists()
