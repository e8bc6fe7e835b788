import pytest
import torch

from mdm_models.data.config import DataConfig
from mdm_models.processes import Processes
from mdm_models.training.config import ModelConfig, ObjectiveConfig, TrainConfig, changed, plan
from mdm_models.training.dry_run.footprint import level_flops, training_flops
from mdm_models.training.monitor import throughput
from mdm_models.training.monitor.throughput import Peak, Throughput, peak_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_named(monkeypatch):
    """A GPU of any name, whose matrix rate is measured as 1."""

    def named(name: str) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(throughput, "_matrix_rate", lambda *args: 1.0)
        return GPU

    return named


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA B200", 2250e12, 1100e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362.05e12, 183e12),
        ("AMD Instinct MI300X OAM", 1307.4e12, 653.7e12),
    ],
)
def test_the_peak_of_a_known_device_is_its_data_sheets(gpu_named, name, bf16, float32):
    device = gpu_named(name)
    assert peak_of(device, torch.bfloat16) == Peak(bf16, f"data sheet of {name}")
    assert peak_of(device, torch.float32).flops == float32


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Novel"])
def test_the_peak_of_another_device_is_measured_and_named_so(gpu_named, name):
    peak = peak_of(gpu_named(name), torch.bfloat16)
    assert peak.flops == 1.0
    assert "measured" in peak.source
    assert name in peak.source


def test_the_measured_rate_is_that_of_a_product(monkeypatch):
    clock = iter([0.0, 0.0, 0.5, 0.1, 0.1, 0.2, 9.0])  # the beginning; 0.5 s; not yet over; 0.1 s; over
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert throughput._matrix_rate(CPU, torch.float32, 16) == pytest.approx(2 * 16**3 / 0.1)


def test_training_costs_three_forward_passes_of_the_levels_shares():
    config = TrainConfig(
        "out",
        DataConfig(("none.tar",), size=32, frames=8),
        ModelConfig("mdm_t2v_tiny"),
        ObjectiveConfig(level_shares=(0.5, 1.0)),
    )
    planned = plan(config)
    outer, inner = level_flops(planned.architecture, config.model, tuple(planned.shapes))
    assert training_flops(config, planned) == 3 * (outer / 2 + inner)
    assert training_flops(changed(config, image_share=0.25), planned) == 3 * (0.75 * outer / 2 + inner)


def test_a_run_on_a_cpu_measures_its_peak():
    config = TrainConfig("out", DataConfig(("none.tar",)), ModelConfig("mdm_t2i_tiny"))
    measured = Throughput.of(config, plan(config), Processes(0, 1, CPU))
    assert "measured on this CPU" in str(measured)
    assert measured.peak.flops > 1e8
