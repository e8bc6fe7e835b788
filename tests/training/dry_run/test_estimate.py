import dataclasses
from pathlib import Path

import pytest

from mdm_models.data.config import DataConfig
from mdm_models.errors import TrainingError
from mdm_models.training.config import ModelConfig, TrainConfig, changed, plan
from mdm_models.training.dry_run.estimate import describe, estimate_memory
from tests import forked
from tests.training.dry_run import peak_memory
from tests.training.models import IMAGE_MODEL, NESTED_MODEL, settings


@pytest.fixture
def config() -> TrainConfig:
    """8 samples of 16² a step on the smallest nested model."""
    return changed(settings(Path("none.tar"), Path("none")), frames=1, batch_size=8)


def memory(config: TrainConfig, world_size: int = 1):
    return estimate_memory(config, plan(config, NESTED_MODEL), world_size, "cpu")


def test_the_estimated_memory_is_close_to_the_measured_peak(tmp_path):
    assert forked.run_together(peak_memory.measure, (tmp_path / "peaks",)) == [0]
    for recompute, peak in zip((True, False), map(int, (tmp_path / "peaks").read_text().split()), strict=True):
        config = peak_memory.configured(recompute)
        estimated = estimate_memory(config, plan(config, IMAGE_MODEL), 1, "cpu")
        assert 2 / 3 < peak / (estimated.activations + estimated.gradients_in_flight) < 3 / 2, recompute


def test_a_process_holds_weights_gradients_two_moments_and_the_averages(config):
    held = memory(changed(config, ema_stds=(0.05, 0.1, 0.2)))
    assert (held.gradients, held.averages, held.gathered) == (held.weights, 3 * held.weights, 0)
    assert held.adam == 2 * held.weights
    assert held.total == sum(dataclasses.astuple(held))


def test_fsdp_shares_the_weights_and_gathers_two_blocks(config):
    alone, shared = memory(config), memory(changed(config, parallel="fsdp", batch_size=32), world_size=4)
    assert shared.weights == alone.weights / 4
    assert 0 < shared.gathered < alone.weights
    assert shared.activations == alone.activations


def test_the_activations_are_of_one_chunk(config):
    assert memory(changed(config, micro_batch=2)).activations < 0.3 * memory(config).activations


@pytest.fixture(scope="module")
def published() -> str:
    config = TrainConfig(
        "runs/a",
        DataConfig(("missing.tar",), size=64),
        ModelConfig("mdm_t2i_64", text_encoder="google/flan-t5-xl", text_tokens=32),
    )
    return describe(changed(config, batch_size=2048, micro_batch=32, steps=500_000, lr=2e-4, device="cuda"), 32)


def test_a_run_is_described_without_data_device_or_text_encoder(published):
    assert "461,359,107 parameters without the text encoder google/flan-t5-xl" in published
    assert "training takes 1.092 TFLOP a sample" in published
    assert "1,024,000,000 in all" in published
    assert "2 × 32 samples one after another on each of 32 processes" in published
    assert "a checkpoint of 7.38 GB" in published
    assert "on a GPU" in published
    assert "on a CPU" not in published


def test_settings_that_differ_from_the_defaults_are_marked(published):
    lines = {line.split()[-2]: line for line in published.splitlines()[2:60] if len(line.split()) > 1}
    assert lines["lr"].startswith("  * lr ")
    assert lines["warmup"].startswith("    warmup ")


def test_settings_that_do_not_fit_are_refused(config):
    with pytest.raises(TrainingError, match="multiple of"):
        describe(changed(config, model="mdm_t2i_tiny", size=30))
    with pytest.raises(TrainingError, match="3 processes"):
        describe(changed(config, model="mdm_t2i_tiny", text_width=64, size=32), world_size=3)
