"""How threads wait on a CPU that has other work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOWING = {"OMP_DISPLAY_ENV": "true", "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given, policy):
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", "import mdm_models"]
    done = subprocess.run(command, env=unset | SHOWING | given, capture_output=True, text=True, check=True)
    [line] = {line.strip() for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line}
    assert line.endswith(f"OMP_WAIT_POLICY = '{policy}'")
