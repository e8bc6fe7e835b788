"""The report of the ahead-of-time compiler, and that the committed one is whole and up to date."""

from pathlib import Path

import pytest

from mdm_kernels.aot.compiler import jobs, record
from mdm_kernels.aot.machine_code import TARGETS
from mdm_kernels.aot.report import Result, markdown, read_json, write_json
from mdm_kernels.aot.shape_classes import SHAPE_CLASSES

REPOSITORY = Path(__file__).parents[2]
JSON = REPOSITORY / "benchmarks/results/aot.json"
REMEDY = "run `make aot-report` and commit what it writes"


def test_too_much_shared_memory_is_a_fault():
    result = Result("op class", "kernel", "sm_80", shared=164 * 1024)
    assert result.fault == "needs 167936 bytes of shared memory; there are 166912"
    assert not Result("op class", "kernel", "sm_90", shared=164 * 1024).fault


def row_of(page: str, name: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if f"| {name} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_the_targets_side_by_side_and_equal_values_once():
    same = {"warps": 4, "instructions": 70, "loads": 9, "wide_loads": 8, "stores": 1, "matrix": 7}
    results = [
        Result("op 8×64", "forward", "sm_80", registers=32, **same),
        Result("op 8×64", "forward", "sm_90", registers=64, **same),
    ]
    row = row_of(markdown("3.9.0", results), "forward")
    assert row == ["8×64", "forward", "32 · 64", "0", "100 · 50", "70", "8/9", "0/1", "7", ""]


def test_specializations_of_one_kernel_have_rows_of_their_own():
    page = markdown("3.9.0", [Result("op class", "forward", "sm_80", variant, registers=variant) for variant in (1, 2)])
    assert row_of(page, "forward")[2] == "1"
    assert row_of(page, "forward #2")[2] == "2"


def test_notes_name_faults_and_what_no_consumer_gpu_can_run():
    results = [
        Result("op class", "broken", "sm_80", error="CompilationError: no"),
        Result("op class", "large", "sm_80", registers=32, shared=100 * 1024),
        Result("op class", "too large", "sm_120", registers=32, shared=100 * 1024),
        Result("op class", "rough", "sm_90", registers=32, matrix=4, tf32=4),
    ]
    page = markdown("3.9.0", results)
    assert row_of(page, "broken")[-1] == "**sm_80: CompilationError: no**"
    assert row_of(page, "large")[-1] == ""
    assert row_of(page, "too large")[-1] == "**sm_120: needs 102400 bytes of shared memory; there are 101376**"
    assert row_of(page, "rough")[-1] == "**sm_90: rounds the inputs of 4 float32 products to tf32**"
    assert "* 4 compilations, of which 3 failed" in page


def test_json_gives_back_what_was_written(tmp_path):
    results = [Result("op class", "kernel", "gfx942", variant=2, registers=5)]
    write_json(tmp_path / "new" / "aot.json", "3.9.0", results)
    assert read_json(tmp_path / "new" / "aot.json") == ("3.9.0", results)


@pytest.fixture
def committed() -> tuple[str, list[Result]]:
    assert JSON.exists(), REMEDY
    return read_json(JSON)


def test_committed_page_says_what_the_committed_figures_say(committed):
    assert (REPOSITORY / "docs/kernels.md").read_text() == markdown(*committed), REMEDY


def test_committed_report_covers_every_kernel_and_shape_class(committed):
    _, results = committed
    targets = {result.target for result in results}
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} <= targets <= TARGETS.keys(), REMEDY
    reported = {(result.shape_class, result.kernel, result.variant, result.target) for result in results}
    launched = {
        (launch.shape_class, launch.name, launch.variant, target)
        for launch, target in jobs(record(SHAPE_CLASSES), targets)
    }
    assert reported == launched, REMEDY
    assert all(result.key for result in results), REMEDY


def test_committed_report_has_no_fault(committed):
    _, results = committed
    assert not [result for result in results if result.fault]
