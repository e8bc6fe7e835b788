"""`make sanitize` finds what it is for, and says when it cannot run; the ops themselves run in `make sanitize`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def sanitizing(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a process where kernels are compiled."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_it_is_skipped_with_a_notice_where_ttsem_is_missing():
    process = sanitizing(
        "import sys; sys.modules['ttsem'] = None; from tests.kernels.sanitize import main; sys.exit(main())"
    )
    assert process.returncode == 0
    assert process.stderr == "sanitize: skipped, as ttsem is not installed (the Makefile says how)\n"


def test_interpreted_kernels_are_refused():
    process = sanitizing("import sys; from tests.kernels.sanitize import main; sys.exit(main())", TRITON_INTERPRET="1")
    assert process.returncode == 1
    assert "unset it" in process.stderr


TWO_CLIPS = """
import sys
from mdm_kernels.temporal import launch
from tests.kernels import calls, sanitize
{plant}
sanitize.CALLS = {{"temporal": lambda: calls.temporal(clips=2, frames=2, positions=3, heads=2, width=16)}}
sys.exit(sanitize.main())
"""
ROWS_ON_ONE_ANOTHER = """
strides = launch._strides
launch._strides = lambda **tensors: {n: 0 if n == "out_row" else s for n, s in strides(**tensors).items()}
"""


@pytest.mark.parametrize("plant", ["", ROWS_ON_ONE_ANOTHER], ids=["right", "race"])
def test_two_programs_that_write_one_element_are_found(plant):
    pytest.importorskip("ttsem")
    process = sanitizing(TWO_CLIPS.format(plant=plant))
    assert process.returncode == (1 if plant else 0), process.stderr
    assert ("KernelFault" in process.stderr) == bool(plant)
