import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mdm_models.cli import main
from mdm_models.config import UNetConfig
from mdm_models.errors import CheckpointError
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.processes import Processes
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.ema.averages import PowerEMA
from mdm_models.training.ema.power_functions import Profile, combine, exponent
from mdm_models.training.ema.snapshots import (
    METADATA,
    ROUNDING,
    forget_snapshots_after,
    list_snapshots,
    reconstruct,
    write_snapshot,
)
from mdm_models.unet import build_model

ALONE = Processes(0, 1, torch.device("cpu"))
STEPS, EVERY = 400, 20


def paths(seed: int) -> np.ndarray:
    """(STEPS, 7) float64: weights that drift, jump and jitter."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(STEPS, 7)) * np.array([1, 0.1, 0.01, 1, 1, 0, 0])
    steps[150, 3] += 50
    return np.cumsum(steps, axis=0) + np.array([0, 0, 0, 0, 100, 5, -3])


def direct(values: np.ndarray, std: float, updates: int) -> np.ndarray:
    """The average by its definition: decay (1 − 1/t)^(γ + 1) at update t."""
    average = np.zeros(values.shape[1])
    for t in range(1, updates + 1):
        decay = (1 - 1 / t) ** (exponent(std) + 1)
        average = decay * average + (1 - decay) * values[t - 1]
    return average


def test_the_width_of_a_power_function_is_its_standard_deviation():
    edges = np.linspace(0, 1, 100_001)
    middle = (edges[1:] + edges[:-1]) / 2
    for std in (0.02, 0.05, 0.1, 0.28):
        share = np.diff(edges ** (exponent(std) + 1))
        mean = share @ middle
        assert np.sqrt(share @ (middle - mean) ** 2) == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("std", [0.06, 0.075, 0.15, 0.25])
def test_an_average_made_from_snapshots_is_within_the_predicted_error_of_the_tracked_one(std):
    values = paths(seed=1)
    kept = [Profile(width, t) for width in (0.05, 0.1) for t in range(EVERY, STEPS + 1, EVERY)]
    combination = combine(kept, Profile(std, STEPS))
    made = combination.weights @ np.stack([direct(values, p.std, p.updates) for p in kept])
    strayed = np.linalg.norm(values - values.mean(axis=0), axis=0)
    error = np.abs(made - direct(values, std, STEPS))
    assert (error <= combination.distance * strayed + 1e-10 * np.abs(values).max(axis=0)).all()
    assert combination.relative_distance < 0.1


def test_a_width_that_was_tracked_is_found_among_the_snapshots():
    kept = [Profile(0.05, 10), Profile(0.05, 20), Profile(0.1, 10), Profile(0.1, 20)]
    combination = combine(kept, Profile(0.1, 20))
    np.testing.assert_allclose(combination.weights, [0, 0, 0, 1], atol=1e-8)
    assert combination.relative_distance < 1e-6


def test_the_weights_of_a_combination_sum_to_1():
    for count in (1, 3, 50):
        kept = [Profile(0.1, t) for t in range(1000, 1000 * count + 1, 1000)]
        assert combine(kept, Profile(0.2, 1000 * count)).weights.sum() == pytest.approx(1, abs=1e-12)


def test_more_snapshots_bring_an_average_closer():
    distances = [
        combine([Profile(0.1, t) for t in range(every, 1001, every)], Profile(0.07, 1000)).distance
        for every in (500, 100, 20)
    ]
    assert distances[0] > 2 * distances[1] > 4 * distances[2]


def trained(run, model: nn.Module, stds, steps: int, every: int, averages: PowerEMA | None = None) -> PowerEMA:
    """Set the weights of step t from a generator of seed t, and keep snapshots."""
    averages = averages or PowerEMA(model, stds)
    for step in range(averages.updates + 1, steps + 1):
        rng = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
        averages.update()
        if step % every == 0:
            write_snapshot(run, step, averages, ALONE)
    return averages


def test_an_average_from_files_is_the_tracked_one_up_to_rounding_and_the_profile(tmp_path):
    model = nn.Linear(20, 10)
    averages = trained(tmp_path, model, [0.05, 0.1, 0.08], steps=100, every=10)
    for path in (tmp_path / "averages").iterdir():  # the run has not tracked 0.08, as far as its files tell
        keep_widths(path, {"0.05", "0.1"})
    made, combination = reconstruct(tmp_path, 0.08)
    assert made.keys() == {"weight", "bias"}
    assert made["weight"].dtype == torch.float32
    rounding = ROUNDING * np.abs(combination.weights).sum() * 3  # no average here reaches 3
    strayed = 5 * np.sqrt(100)  # normal numbers, over 100 updates
    error = (made["weight"] - averages.by_std[0.08]["weight"]).abs().max()
    assert error <= rounding + combination.distance * strayed
    assert error < 0.05 * averages.by_std[0.08]["weight"].std()


def keep_widths(path, stds: set[str]) -> None:
    with safe_open(path, "pt") as file:
        keys, metadata = file.keys(), json.loads(file.metadata()[METADATA])
        tensors = {key: file.get_tensor(key) for key in keys if key.split("/")[0] in stds}
    metadata["stds"] = sorted(float(std) for std in stds)
    save_file(tensors, path, {METADATA: json.dumps(metadata)})


def test_a_resumed_run_has_the_same_snapshots(tmp_path):
    model = nn.Linear(3, 2)
    trained(tmp_path / "whole", model, [0.05, 0.1], steps=30, every=10)
    killed, run = PowerEMA(model, [0.05, 0.1]), tmp_path / "killed"
    trained(run, model, None, 15, 10, killed)
    saved = {name: value.clone() for name, value in killed.state_dict().items()}
    trained(run, model, None, 29, 10, killed)
    resumed = PowerEMA(model, [0.05, 0.1])
    resumed.load_state_dict(saved)
    forget_snapshots_after(run, 15)
    assert [snapshot.updates for snapshot in list_snapshots(run)] == [10]
    trained(run, model, None, 30, 10, resumed)
    files = [sorted((tmp_path / name / "averages").iterdir()) for name in ("whole", "killed")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_only_the_leading_process_writes(tmp_path):
    class Follower(Processes):
        def agree(self, work) -> list:
            return [None, work()]

    write_snapshot(tmp_path, 1, PowerEMA(nn.Linear(3, 2), [0.1]), Follower(1, 2, torch.device("cpu")))
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "averages").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_snapshot(tmp_path, 1, PowerEMA(nn.Linear(3, 2), [0.1]), ALONE)


@pytest.fixture
def finished(tmp_path):
    """A run of a small captioned model, with snapshots and the model of its end; and its averages."""
    config = UNetConfig(
        channels=(8, 8), blocks=(1, 1), embed_dim=16, norm_groups=4, num_heads=2, mid_blocks=True, context_dim=16
    )
    encoder = TransformerTextEncoder(16, layers=1, num_heads=2, max_tokens=8)
    encoder.requires_grad_(True)
    model = nn.ModuleDict({"unet": build_model(config), "text": encoder})
    averages = trained(tmp_path / "run", model, [0.05, 0.1], steps=20, every=5)
    Pipeline(model["unet"], encoder, PipelineConfig(size=8, max_tokens=8)).save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run", averages


def test_mdm_ema_writes_a_pipeline_with_the_average_of_the_width(finished, tmp_path, capsys):
    run, averages = finished
    assert main(["ema", str(run), "--std", "0.1", "--out", str(tmp_path / "out")]) == 0
    pipeline = Pipeline.from_pretrained(tmp_path / "out")
    tracked = averages.by_std[0.1]
    for part, module in (("unet.", pipeline.model), ("text.", pipeline.text_encoder)):
        for name, weight in module.named_parameters():
            torch.testing.assert_close(weight, tracked[part + name], rtol=ROUNDING, atol=2**-24)
    assert "from 4 snapshots" in capsys.readouterr().out


def test_mdm_ema_leaves_the_model_that_was_there_where_the_disk_is_full(finished, tmp_path, capsys, monkeypatch):
    command = ["ema", str(finished[0]), "--out", str(tmp_path / "out")]
    assert main([*command, "--std", "0.1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(self, directory) -> None:
        raise OSError(28, "No space left on device", str(directory / "model.safetensors"))

    monkeypatch.setattr(TransformerTextEncoder, "save", full)
    assert main([*command, "--std", "0.05"]) == 2
    assert "No space left on device: '" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("std", "word"), [("0.3", "0.289"), ("-1", "0.289")])
def test_mdm_ema_refuses_a_width_that_no_average_has(finished, tmp_path, capsys, std, word):
    assert main(["ema", str(finished[0]), f"--std={std}", "--out", str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err


def test_mdm_ema_names_what_a_run_lacks(finished, tmp_path, capsys):
    run, _ = finished
    for path in (run / "averages").iterdir():
        path.unlink()
    assert main(["ema", str(run), "--std", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "--ema-stds" in capsys.readouterr().err
    (run / "model" / "config.json").unlink()
    assert main(["ema", str(run), "--std", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "writes it when it ends" in capsys.readouterr().err


def test_mdm_ema_names_a_damaged_snapshot(finished, tmp_path, capsys):
    run, _ = finished
    (run / "averages" / "step-00000010.safetensors").write_bytes(b"cut")
    assert main(["ema", str(run), "--std", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert "step-00000010" in capsys.readouterr().err
