import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import call_overhead


def test_command_prints_what_a_call_of_each_op_costs():
    """In a process of its own: interpreter and compiler do not share one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.call_overhead", "--seconds", "0"], env=environment, text=True,
        capture_output=True, check=False, cwd=Path(call_overhead.__file__).parents[1],
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    header, *rows = process.stdout.splitlines()
    assert "forward + backward" in header
    assert {re.split(r"[ ,]", row)[0] for row in rows} == {
        "flash_attention",
        "group_norm_silu",
        "multires_loss",
        "multires_noise",
        "self_cross_attention",
        "temporal_attention",
    }
    assert all(float(cost) > 0 for row in rows for cost in re.findall(r"\d+\.\d", row))


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call_overhead.main([]) == 2
    assert capsys.readouterr().err.startswith("TRITON_INTERPRET=1 is set")
