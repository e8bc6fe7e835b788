"""How much of the device's matrix rate a run turns into training: model FLOPs utilization (MFU).

MFU = samples a second × operations the model needs for one sample ÷ (processes × peak rate of a device). The model
needs its forward pass and twice as much for the backward pass, in matrix products and convolutions (see `footprint`);
what is computed again under activation checkpointing, a frozen text encoder, the averages and the optimizer do not
count, so that a change that wastes work cannot raise it (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).
"""

import functools
import re
import time
from dataclasses import dataclass

import torch

from mdm_models.processes import Processes
from mdm_models.training.config import Plan, TrainConfig
from mdm_models.training.dry_run.footprint import training_flops

# Dense rates in TFLOP/s from the vendors' data sheets: bfloat16 with float32 sums; float32 as convolutions compute it
# unless told otherwise, on TF32 matrix units. Half of what the sheets of NVIDIA state for sparse matrices. Nothing else
# about a device may stand in its name: a part of one (MIG), a laptop's or an export version has other rates.
PEAKS = [
    (r"NVIDIA A100(-SXM4|-PCIE)-\d+GB|NVIDIA A100 80GB PCIe", 312.0, 156.0),  # NVIDIA A100 data sheet, 2021
    (r"NVIDIA H100 PCIe", 756.0, 378.0),  # NVIDIA H100 data sheet, 2022, as the next two
    (r"NVIDIA H100 NVL", 835.0, 417.5),
    (r"NVIDIA H100( SXM5)?( 80GB HBM3)?", 989.4, 494.7),
    (r"NVIDIA H200", 989.4, 494.7),  # NVIDIA H200 data sheet, 2024
    (r"NVIDIA B200", 2250.0, 1100.0),  # NVIDIA HGX B200 data sheet, 2025
    (r"NVIDIA GB200", 2500.0, 1250.0),  # NVIDIA GB200 NVL72 data sheet, 2025
    (r"NVIDIA L4", 121.0, 60.0),  # NVIDIA L4 data sheet, 2023
    (r"NVIDIA L40S", 362.05, 183.0),  # NVIDIA L40S data sheet, 2023
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),  # NVIDIA Ada GPU architecture, 2023, appendix A
    (r"AMD Instinct MI300X.*", 1307.4, 653.7),  # AMD Instinct MI300X data sheet, 2023
    (r"AMD Instinct MI325X.*", 1307.4, 653.7),  # AMD Instinct MI325X data sheet, 2024
]
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of the matrices that are multiplied on a device without a data sheet
SECONDS = 0.2  # how long


@dataclass(frozen=True)
class Peak:
    """The most operations a second that a device can do, and how that is known."""

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Find a device's peak: the data sheet's rate in bfloat16 or float32, or else that of a large matrix product,
    measured here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for pattern, bf16, float32 in PEAKS:
        if re.fullmatch(pattern, name):
            rate = bf16 if dtype == torch.bfloat16 else float32
            return Peak(rate * 1e12, f"data sheet of {name}")
    size = MATRIX[device.type]
    return Peak(_matrix_rate(device, dtype, size), f"matrix product of {size}² measured on this {name}")


@functools.cache
def _matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of the fastest of several products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    finished = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    torch.mm(a, b)
    times, until = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < until:
        finished()
        begin = time.perf_counter()
        torch.mm(a, b)
        finished()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


@dataclass(frozen=True)
class Throughput:
    """What utilization is reckoned from."""

    flops_per_sample: float
    """of training, forward and backward"""
    peak: Peak
    """of one device"""
    world_size: int
    """processes, each with a device of its own"""

    @classmethod
    def of(cls, config: TrainConfig, planned: Plan, processes: Processes) -> "Throughput":
        """Find what a run's utilization of this device is reckoned from; where the data sheet is missing, this
        multiplies matrices for a moment."""
        dtype = torch.bfloat16 if config.system.uses_bf16(processes.device.type) else torch.float32
        return cls(training_flops(config, planned), peak_of(processes.device, dtype), processes.world_size)

    def __str__(self) -> str:
        peak = f"{self.peak.flops / 1e12:.4g} TFLOP/s ({self.peak.source})"
        return f"MFU is the share of {peak}, at {self.flops_per_sample / 1e12:.4g} TFLOP a sample"

    def utilization(self, samples_per_second: float) -> float:
        """Give the MFU, 0…1, of that many samples a second over all processes."""
        return samples_per_second * self.flops_per_sample / (self.world_size * self.peak.flops)
