import json

import pytest
import torch

from benchmarks import machine, models, plain, throughput
from benchmarks.report import ModelRow, table
from benchmarks.timing import Timing, peak_memory

CPU = torch.device("cpu")


def run(*arguments: str) -> None:
    throughput.main(throughput.parse_arguments([*arguments, "--device", "cpu"]))


def test_command_prints_every_model_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: 1e11)
    file = tmp_path / "new" / "results.json"
    run("--quick", "--seconds", "0", "--models", "mdm_t2i_tiny", "--json", str(file))
    rows = json.loads(file.read_text())["rows"]
    printed = capsys.readouterr().out
    assert {row["name"] for row in rows} == {"mdm_t2i_tiny"}
    assert {row["step"] for row in rows} == {"training step", "sampling step"}
    assert "mdm_t2i_tiny" in printed
    assert all(row["timings"]["ours"]["median"] > 0 and row["floor"] > 0 for row in rows)


def test_plain_objective_computes_what_ours_computes():
    case = models.ModelCase("mdm_t2v_tiny", batch=2, dtype=torch.float32, device=CPU)
    noise = [torch.randn(2, 3, 8, 32, 32), torch.randn(2, 3, 1, 32, 32)]
    preds = [torch.randn_like(level) for level in noise]

    def results():
        x_t = case.diffusion.add_noise(case.images, case.time, case.strides, noise)
        return [*x_t, case.diffusion.per_sample_loss(preds, case.images, case.time, noise)]

    ours = results()
    with plain.plain_pytorch():
        theirs = results()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_peak_memory_counts_what_lives_at_once():
    def chain():
        x = torch.zeros(1000)
        for _ in range(4):
            x = x + 1

    assert peak_memory(chain, CPU) == 2 * 4000


def test_table_shows_the_ratio_of_medians():
    times = {"ours": Timing(0.5, 0.4, 0.6), "plain": Timing(1.0, 0.9, 1.1)}
    row = ModelRow("mdm_t2i_64", "1×32", "forward", 4, times, {"ours": 10**6, "plain": 2 * 10**6}, floor=0.25)
    line = table([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "mdm_t2i_64", "1×32", "forward", "500", "1e+03", "2.00×", "8", "250", "50 %", "1", "2",
    ]  # fmt: skip


def test_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit):
        run("--models", "mdm_t2i_65")
    assert "'mdm_t2i_65': no such model" in capsys.readouterr().err


def test_a_reference_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--reference", str(tmp_path))
    assert "is no checkout of apple/ml-mdm" in capsys.readouterr().err


def test_a_model_that_the_official_code_lacks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--reference", str(tmp_path), "--models", "mdm_t2v_64")
    assert "the official code has mdm_t2i_64" in capsys.readouterr().err


def test_graphs_without_a_gpu_are_refused(capsys):
    with pytest.raises(SystemExit):
        run("--cuda-graphs")
    assert capsys.readouterr().err.endswith("error: --cuda-graphs: needs a GPU; --device is cpu\n")
