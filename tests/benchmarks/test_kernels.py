"""The benchmark of the ops, on a CPU at small shapes: everything but the numbers."""

import csv
import dataclasses
import functools
import json
import sys

import pytest
import torch

from benchmarks import contenders, figures, kernel_report, kernels, libraries, machine, measure, shapes
from benchmarks.case import Case, Place
from benchmarks.contenders import COMPILED, OURS, PYTORCH, SDPA
from benchmarks.machine import Rates
from benchmarks.measure import BOTH, FORWARD, KernelRow, Outcome
from benchmarks.targets import verdicts
from benchmarks.timing import Timing

CPU = torch.device("cpu")
RATES = Rates(copy=1e10, matrix=1e11)


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch):
    monkeypatch.setattr(machine, "copy_rate", lambda device: RATES.copy)
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: RATES.matrix)


def run(*arguments: str) -> None:
    kernels.main(kernels.parse_arguments([*arguments, "--device", "cpu", "--seconds", "0"]))


def test_command_writes_figures_table_and_pictures(tmp_path, capsys):
    run("--out", str(tmp_path), "--filter", "temporal", "--plot")
    _, rows = kernel_report.read_json(tmp_path / "kernels.json")
    assert [(row.op, row.step) for row in rows] == [("temporal_attention", FORWARD), ("temporal_attention", BOTH)]
    assert all(row.seconds(OURS) > 0 and row.seconds(PYTORCH) > 0 for row in rows)
    page = (tmp_path / "kernels.md").read_text()
    assert "**No kernel ran.**" in page
    assert "## Ours, as PyTorch references" in page
    assert "No kernel ran" in capsys.readouterr().out
    for picture in ("roofline.png", "speedups.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "kernels.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["contender"]) for line in lines] == [
        (row.step, name) for row in rows for name in row.outcomes
    ]
    assert float(lines[0]["median"]) == rows[0].seconds(OURS)


CASES = shapes.small_cases(Place(CPU, torch.float32))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.shape}")
def test_ours_and_plain_pytorch_compute_the_definition(case: Case, monkeypatch):
    monkeypatch.setitem(measure.MOST_SETS, "cpu", 1)
    row = measure.measure(case, measure.steps(case)[-1], RATES, CPU, seconds=0, with_compile=False)
    for name in (OURS, PYTORCH):
        if name in row.outcomes:
            assert row.seconds(name) > 0, row.outcomes[name].failure
            assert row.outcomes[name].error is None or row.outcomes[name].error < 1e-4
    assert (row.outcomes.get(OURS, Outcome()).error is None) == (case.oracle is None)


def test_every_gpu_shape_states_its_floor():
    place = Place(torch.device("cuda"), torch.bfloat16)
    for case in shapes.gpu_cases(place) + shapes.quick_gpu_cases(place):
        assert case.forward_bytes > 0
        assert case.forward_operations > 0
        assert bool(case.backward_bytes) == bool(case.backward_operations)


def test_floor_of_group_norm_is_a_read_and_a_write():
    case = next(case for case in shapes.gpu_cases(Place(CPU, torch.bfloat16)) if case.shape == "64×256×64²")
    tensor = 64 * 256 * 64 * 64 * 2  # bytes
    assert measure.row(case, FORWARD, RATES, {}).floor == 2 * tensor / RATES.copy
    assert measure.row(case, BOTH, RATES, {}).floor == 5 * tensor / RATES.copy


SMALL = Case(
    op="double",
    shape="1×2",
    inputs=lambda: (torch.ones(1, 2),),
    ours=lambda x: 2 * x,
    plain=lambda x: x + x,
    oracle=lambda x: 2 * x,
    forward_bytes=16,
    forward_operations=2,
    backward_bytes=16,
    backward_operations=2,
    sample_dims=(0,),
)


def measured(case: Case, step: str = FORWARD) -> KernelRow:
    return measure.measure(case, step, RATES, CPU, seconds=0, with_compile=False)


def test_a_rival_that_fails_is_recorded_and_the_others_run():
    def broken(x):
        raise RuntimeError("no such luck\nand more")

    row = measured(dataclasses.replace(SMALL, libraries={"broken": broken}))
    assert row.outcomes["broken"].failure == "RuntimeError: no such luck"
    assert row.seconds(PYTORCH) > 0
    assert "| double | broken | 1    | RuntimeError: no such luck |" in kernel_report.markdown(MACHINE, [row])


def test_a_row_that_nobody_can_do_keeps_every_reason():
    def broken(x):
        raise RuntimeError("no such luck")

    row = measured(dataclasses.replace(SMALL, ours=broken, plain=broken, oracle=None))
    assert {name: outcome.failure for name, outcome in row.outcomes.items()} == {
        OURS: "RuntimeError: no such luck",
        PYTORCH: "RuntimeError: no such luck",
    }


@pytest.mark.parametrize("step", [FORWARD, BOTH])
def test_a_wrong_rival_shows_in_its_error(step):
    row = measured(dataclasses.replace(SMALL, plain=lambda x: 3 * x), step)
    assert row.outcomes[PYTORCH].error == pytest.approx(0.5)
    assert row.outcomes[OURS].error == 0


def test_a_wrong_gradient_shows_in_the_error():
    row = measured(dataclasses.replace(SMALL, plain=lambda x: x + x.detach()), BOTH)
    assert row.outcomes[PYTORCH].error == pytest.approx(0.5)


def test_gradients_of_images_in_channels_last_come_in_channels_last():
    norm = CASES[0]
    contiguous = dataclasses.replace(norm, plain=lambda *inputs: norm.plain(*inputs).contiguous())
    *_, gradient = measure._input_sets(contiguous, True, CPU)[0]
    assert gradient.stride(1) == 1


def test_a_result_that_is_not_a_number_is_no_small_error():
    row = measured(dataclasses.replace(SMALL, plain=lambda x: x * float("nan")))
    assert row.outcomes[PYTORCH].error != row.outcomes[PYTORCH].error


def test_inputs_that_cannot_be_made_cost_one_row_only(tmp_path, monkeypatch):
    def too_large():
        raise RuntimeError("out of memory")

    cases = [dataclasses.replace(SMALL, inputs=too_large), SMALL]
    monkeypatch.setattr(shapes, "small_cases", lambda place: cases)
    monkeypatch.setattr(figures, "plot", lambda results: None)
    run("--out", str(tmp_path), "--filter", FORWARD)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["outcomes"]["ours"]["failure"] for row in rows] == ["RuntimeError: out of memory"] * 2 + ["", ""]


def test_each_row_is_written_before_the_next_is_measured(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "small_cases", lambda place: [SMALL, dataclasses.replace(SMALL, inputs=interrupted)])
    with pytest.raises(KeyboardInterrupt):
        run("--out", str(tmp_path))
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == 2


def test_libraries_that_are_missing_say_so(monkeypatch):
    for name in ("apex", "apex.contrib.group_norm", "liger_kernel", "liger_kernel.transformers.group_norm", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
    x = torch.randn(1, 32, 4, 4)
    for call in libraries.group_norm_silu(32, 32).values():
        with pytest.raises(ImportError):
            call(x, x[0, :, 0, 0], x[0, :, 0, 0])
    with pytest.raises(ImportError):
        libraries.flash_attention()["xformers"](x, x, x)


def test_compiled_rival_is_among_them_on_demand():
    case = next(case for case in CASES if case.op == "flash_attention")
    assert COMPILED not in contenders.contenders(case, with_compile=False)
    found = contenders.contenders(case, with_compile=True)
    assert {OURS, PYTORCH, COMPILED, SDPA + "flash", "xformers"} <= found.keys()


def test_compiled_rival_is_measured(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = measure.measure(SMALL, BOTH, RATES, CPU, seconds=0, with_compile=True)
    assert row.seconds(COMPILED) > 0, row.outcomes[COMPILED].failure
    assert row.outcomes[COMPILED].error == 0


MACHINE = {"device": "test", "dtype": "bf16", "copy GB/s": 10.0, "matrix TFLOP/s": 0.1, "kernels ran": True}


def row_of(op: str, largest_tensor: int = 10**9, floor: float = 0.8, **seconds: float) -> KernelRow:
    outcomes = {name: Outcome(Timing(time, time, time)) for name, time in seconds.items()}
    return KernelRow(op, "1×1", FORWARD, largest_tensor, 1, 1, floor, True, outcomes)


def test_targets_compare_ours_with_each_rival():
    row = row_of("group_norm_silu", **{OURS: 1.0, PYTORCH: 3.5, COMPILED: 1.1})
    assert [str(verdict) for verdict in verdicts(row)] == [
        "≥ 85 % of the copy rate: 80 %, **missed**",
        "≥ 3.0× PyTorch: 3.50×, met",
        "≥ 1.2× torch.compile: 1.10×, **missed**",
    ]


def test_copy_rate_is_asked_of_large_tensors_only():
    assert len(verdicts(row_of("group_norm_silu", largest_tensor=10**6, **{OURS: 1.0}))) == 2


def test_attention_is_held_against_the_fastest_backend():
    row = row_of("self_cross_attention", **{OURS: 1.0, PYTORCH: 2.0, SDPA + "flash": 1.5, SDPA + "math": 9.0})
    (verdict,) = verdicts(row)
    assert verdict.reached == 1.5


def test_a_target_without_its_rival_is_not_met():
    (verdict,) = verdicts(row_of("flash_attention", **{OURS: 1.0}))
    assert not verdict.met
    assert str(verdict) == "≥ 1.0× the fastest SDPA: not measured"


def test_page_counts_the_targets_met():
    page = kernel_report.markdown(MACHINE, [row_of("group_norm_silu", **{OURS: 1.0, PYTORCH: 3.5, COMPILED: 1.1})])
    assert "Targets met: 1 of 3." in page


def test_pictures_are_left_out_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures.plot(tmp_path / "kernels.json")
    assert capsys.readouterr().out.startswith("matplotlib is not installed: no pictures; later, elsewhere: python -m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--out is missing"),
        pytest.param(
            ["--device", "cuda"],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_bad_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        kernels.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_filter_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--filter 'nothing': no row contains it"):
        run("--out", str(tmp_path), "--filter", "nothing")


def test_folder_of_a_device():
    assert machine.slug(CPU) == machine.slug(CPU).strip("-").lower()
    assert " " not in machine.slug(CPU)
