"""`make sanitize` finds what it is for, and says when it cannot run; the ops themselves run in `make sanitize`."""

import pytest

from tests.kernels import sanitize
from tests.kernels.compiling import compiling_python


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    with compiling_python(tmp_path_factory.mktemp("compiling")) as run:
        yield run


def test_it_is_skipped_with_a_notice_where_ttsem_is_missing(compiling):
    process = compiling(
        "import sys; sys.modules['ttsem'] = None; from tests.kernels.sanitize import main; sys.exit(main())"
    )
    assert process.returncode == 0
    assert process.stderr == "sanitize: skipped, as ttsem is not installed (the Makefile says how)\n"


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert sanitize.main() == 1
    assert "unset it" in capsys.readouterr().err


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
def test_two_programs_that_write_one_element_are_found(compiling, plant):
    if reason := sanitize.why_skipped():
        pytest.skip(reason)
    process = compiling(TWO_CLIPS.format(plant=plant))
    assert process.returncode == (1 if plant else 0), process.stderr
    assert ("KernelFault" in process.stderr) == bool(plant)
