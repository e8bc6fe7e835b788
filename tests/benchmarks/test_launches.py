"""Steps as Python launches them and as graphs, which are recorded here in the place of CUDA's."""

import copy
import json

import pytest
import torch

from benchmarks import launches, machine, models, official, throughput
from benchmarks.launches import WayRow, outcomes, table
from benchmarks.machine import Rates
from benchmarks.measure import Outcome
from benchmarks.timing import Timing
from mdm_kernels.group_norm import cpu
from mdm_models import create_model, zoo
from mdm_models.diffusion.schedule import NoiseSchedule
from tests.models import recorded_graph
from tests.models.small_pipelines import NESTED_MODEL

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch) -> list[recorded_graph.RecordedGraph]:
    """The graphs captured so far."""
    captured, _ = recorded_graph.install(monkeypatch)
    monkeypatch.setattr(NoiseSchedule, "_check", lambda self, t: None)  # as on a GPU, where no value is looked at
    monkeypatch.setattr(cpu, "pays", lambda *tensors: False)
    monkeypatch.setitem(zoo._CONFIGS, "mdm_t2i_tiny", lambda: NESTED_MODEL)
    return captured


def test_a_graph_is_measured_beside_python_and_its_results_are_judged(graphs):
    x = torch.ones(3)
    found = outcomes({"double": lambda: 2 * x}, CPU, seconds=0, graphed=["double"], error=lambda y: y.sum().item() - 6)
    assert {who: outcome.launched for who, outcome in found.items()} == {
        "double": "Python",
        "double, graph": "CUDA graph",
    }
    assert all(outcome.timing and outcome.error == 0 for outcome in found.values())
    assert graphs[0].replays == 1 + 1 + 3  # for its results, before the timing, and timed


def test_what_fails_says_so_and_the_others_are_measured(graphs):
    def looks():
        return torch.ones(1).item()

    def broken():
        raise RuntimeError("no such luck")

    found = outcomes(
        {"looks": looks, "broken": broken, "fine": lambda: torch.ones(1)}, CPU, seconds=0, graphed=("looks", "fine")
    )
    assert found["looks"].timing
    assert found["looks, graph"].failure == "RuntimeError: operation not permitted when stream is capturing"
    assert found["broken"].failure == "RuntimeError: no such luck"
    assert found["fine"].timing
    assert found["fine, graph"].timing


def test_both_steps_of_a_model_are_measured_in_four_ways(graphs):
    case = models.ModelCase("mdm_t2i_tiny", batch=1, dtype=torch.bfloat16, device=CPU)
    rows = list(models.measure_graphs(case, Rates(copy=1e10, matrix=1e11), seconds=0))
    ways = ("ours", "plain", "ours, graph", "plain, graph")
    assert [(row.step, row.who) for row in rows] == [
        (step, who) for step in ("training step", "sampling step") for who in ways
    ]
    assert all(row.outcome.timing for row in rows), [row.outcome.failure for row in rows]


def test_command_prints_python_and_graphs_and_writes_json(graphs, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: 1e11)
    file = tmp_path / "results.json"
    arguments = ["--cuda-graphs", "--device", "cuda", "--models", "mdm_t2i_tiny", "--seconds", "0", "--json", str(file)]
    with monkeypatch.context() as with_a_gpu:
        with_a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        options = throughput.parse_arguments(arguments)
    options.device = "cpu"
    throughput.main(options)
    rows = json.loads(file.read_text())["rows"]
    assert [row["who"] for row in rows] == 2 * ["ours", "plain", "ours, graph", "plain, graph"]
    assert all(row["outcome"]["timing"]["median"] > 0 and row["floor"] > 0 for row in rows)
    assert "× plain, graph" in capsys.readouterr().out
    assert "× plain, graph" in file.with_suffix(".md").read_text()


def test_a_graph_of_a_training_step_trains(graphs):
    """A replay moves the weights to where the step that Python makes moves them."""
    cases = [models.ModelCase("mdm_t2i_tiny", batch=1, dtype=torch.float32, device=CPU) for _ in range(2)]
    for case in cases:
        case.training_step(seed=1)  # Adam's averages exist
    replay, _ = launches.capture(lambda: cases[0].training_step(seed=1))
    before = {name: weight.clone() for name, weight in cases[0].model.named_parameters()}
    replay()
    moved = [not torch.equal(weight, before[name]) for name, weight in cases[0].model.named_parameters()]
    assert any(moved)
    for _ in range(3):  # as many as warm up, capture and replay: here a capture runs what it records
        cases[1].training_step(seed=1)
    for ours, theirs in zip(cases[0].model.parameters(), cases[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


class Wrapped(torch.nn.Module):
    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs):
        return self.network(*inputs)


def test_the_official_code_is_measured_in_bfloat16_as_graphs_too(graphs, monkeypatch, tmp_path):
    ours = create_model("mdm_t2i_tiny").eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.05)  # those that start at zero, too
    monkeypatch.setattr(official, "pair", lambda name, checkout: (Wrapped(copy.deepcopy(ours)), ours))
    rows = list(official.measure("mdm_t2i_tiny", tmp_path, 1, CPU, 0, backward=True, graphs=True))
    ways = ["official, float32", "official, bf16 autocast", "ours, float32", "ours, bf16", "ours, bf16 autocast"]
    ways += [f"{who}, graph" for who in ways if "bf16" in who]
    assert [(row.step, row.who) for row in rows] == [
        (step, who) for step in ("forward", "forward + backward") for who in ways
    ]
    for row in rows:
        assert row.outcome.timing, row.outcome.failure
        error = row.outcome.error
        assert error is not None
        assert error == 0 if "float32" in row.who else 0 < error < 0.1
    assert [row.who for row in official.measure("mdm_t2i_tiny", tmp_path, 1, CPU, 0)] == ways[:5]


def way(who: str, seconds: float, peak: int, error: float | None = None) -> WayRow:
    outcome = Outcome(Timing(seconds, seconds / 2, 2 * seconds), peak, error)
    return WayRow("mdm_t2i_64", "8×64²", "forward", who, outcome, floor=0.05)


def cells(rows: list[WayRow], rivals: tuple[str, ...]) -> list[list[str]]:
    lines = [line for line in table(rows, rivals).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_compares_with_each_rival_and_its_graph():
    rows = [
        way("official, float32", 2.0, 9 * 10**6, 0.0),
        way("official, bf16", 1.0, 5 * 10**6, 0.01),
        way("official, bf16, graph", 0.4, 10**7, 0.01),
        way("ours, bf16, graph", 0.1, 4 * 10**6, 0.02),
    ]
    header, _, *lines = cells(rows, ("official, float32", "official, bf16"))
    assert header[6:9] == ["× official, float32", "× official, bf16", "× official, bf16, graph"]
    assert lines[-1] == [
        "mdm_t2i_64", "8×64²", "forward", "ours, bf16, graph", "100", "50 to 200", "20.00×", "10.00×", "4.00×",
        "50 %", "4", "40 %", "0.02",
    ]  # fmt: skip
    assert lines[0][-2] == "180 %"  # by Python, of what by Python takes


def test_table_says_what_failed_and_why():
    rows = [
        WayRow("mdm_t2i_64", "8×64²", "forward", "plain", Outcome(failure="RuntimeError: no memory")),
        way("ours", 0.01, 10**6),
    ]
    _, _, failed, ours = cells(rows, ("plain",))
    assert failed[4] == "failed"
    assert ours[4] == "10"
    assert ours[6] == ""
    assert table(rows, ("plain",)).endswith("\nmdm_t2i_64, forward, plain: RuntimeError: no memory")
