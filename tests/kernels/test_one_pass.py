"""group_norm_silu in one pass: its programs beside each other, in any order, however few; against the path by tiles.

How accurate it is, test_group_norm.py and test_group_norm_skip.py ask, with one program after the other.
"""

import importlib

import pytest
import torch
import triton
import triton.language as tl

from mdm_kernels import backend
from mdm_kernels.group_norm import launch, one_pass_kernels
from tests.kernels import calls
from tests.kernels.calls import in_one_pass

UNITS = {
    "units of one block": (16, 4),
    "units of a row": (12, 2),
    "groups across blocks, a last unit with less": (18, 3),
}


@pytest.fixture(autouse=True)
def interpreted(request):
    if request.config.getoption("device") != "cpu":
        pytest.skip("needs Triton's interpreter; what a GPU shows of one pass, test_on_gpu.py asks")


@pytest.fixture
def small_tiles(monkeypatch):
    """Four channels and 16 positions, so that small inputs have several tiles a unit and several units."""
    monkeypatch.setattr(launch, "CHANNELS_LAST_TILE", 64)
    monkeypatch.setattr(launch, "CHANNELS_LAST_WIDTHS", (4,))
    monkeypatch.setattr(launch, "WHOLE_GROUP_BYTES", 0)
    launch.row_tiles.cache_clear()
    yield
    launch.row_tiles.cache_clear()


def launches_of(run) -> list[dict]:
    """The arguments of every launch."""
    found, launch_one = [], backend.launch

    def noted(kernel, grid, **arguments):
        found.append(arguments)
        launch_one(kernel, grid, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "launch", noted)
        run()
    return [arguments for arguments in found if "counters_ptr" in arguments]


def run_at_once(monkeypatch, at_once: int, seed: int | None) -> None:
    from tests.kernels import programs_at_once  # not before Triton's interpreter is chosen

    for kernel in (one_pass_kernels.one_pass_forward, one_pass_kernels.one_pass_backward):
        programs_at_once.run_at_once(monkeypatch, kernel, at_once, seed)


@pytest.mark.parametrize(("units", "at_once"), list(zip(UNITS, (2, 1000, 3), strict=True)))
def test_however_many_programs_run_and_in_any_order_the_bits_are_those_of_the_tiles(
    units, at_once, small_tiles, monkeypatch
):
    channels, groups = UNITS[units]
    call = calls.group_norm(1, channels - 3, 5, 5, skip=3, groups=groups, film_rows=1)
    expected = call.run("triton")
    run_at_once(monkeypatch, at_once, seed=at_once)
    results = in_one_pass(call).run("triton")
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_no_tile_is_read_twice_where_all_programs_run_at_once(small_tiles, monkeypatch):
    run_at_once(monkeypatch, 1000, seed=None)
    call = in_one_pass(calls.group_norm(2, 12, 5, 5, groups=2))
    both = launches_of(lambda: call.run("triton"))
    assert len(both) == 2
    assert not any(arguments["counters_ptr"][1:, one_pass_kernels.LEFT.value].any() for arguments in both)


def test_alone_a_program_leaves_all_tiles_of_a_unit_but_the_last(small_tiles):
    call = in_one_pass(calls.group_norm(2, 8, 5, 7, groups=2))
    for arguments in launches_of(lambda: call.run("triton")):
        tiles_of_a_unit = arguments["tiles"]
        assert (arguments["counters_ptr"][1:, one_pass_kernels.LEFT.value] == tiles_of_a_unit - 1).all()


@triton.jit
def impatient(counter_ptr, COUNT: tl.constexpr):
    """Waits for programs that may not have started."""
    one_pass_kernels.take(counter_ptr)
    one_pass_kernels.acquire(counter_ptr, COUNT)


@pytest.mark.parametrize("at_once", [3, 2])
def test_a_kernel_that_waits_for_programs_not_started_is_found_to_hang(at_once, monkeypatch):
    from tests.kernels import programs_at_once

    monkeypatch.setattr(programs_at_once, "MOST_TURNS", 500)
    programs_at_once.run_at_once(monkeypatch, impatient, at_once, seed=0)
    if at_once == 3:
        impatient[(3,)](torch.zeros(1, dtype=torch.int32), 3)
        return
    with pytest.raises(Exception, match="2 of 3 programs still run after 500 turns, 1 wait"):
        impatient[(3,)](torch.zeros(1, dtype=torch.int32), 3)


def test_it_is_off_unless_asked_for(small_tiles):
    call = calls.group_norm(1, 8, 5, 5, groups=2)
    assert len(launches_of(lambda: in_one_pass(call).run("triton"))) == 2
    assert not launches_of(lambda: call.run("triton"))


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "_one_pass", "0")  # which is so again after the test
    monkeypatch.setenv("MDM_KERNELS_ONE_PASS", "yes")
    with pytest.raises(ValueError, match="MDM_KERNELS_ONE_PASS is 'yes'"):
        importlib.reload(launch)
