"""The machine that a benchmark runs on: its name, and the rates that floors are computed from."""

import platform
import re
from dataclasses import dataclass

import torch

from benchmarks.timing import time_side_by_side


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: bytes a second of a copy, operations a second of a matrix product."""

    copy: float
    matrix: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Rates":
        return cls(copy_rate(device), matrix_rate(device, dtype))


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as info:
        models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    """Name a folder after the device: NVIDIA H100 80GB HBM3 → nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def describe(device: torch.device, dtype: str, rates: Rates) -> dict[str, str | float]:
    """Describe the machine as it stands above a table of results."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": device_name(device),
        "dtype": dtype,
        "copy GB/s": round(rates.copy / 1e9, 1),
        "matrix TFLOP/s": round(rates.matrix / 1e12, 3),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "none",
    }


def copy_rate(device: torch.device) -> float:
    """Measure the bytes a second that a copy reads and writes, counting both, on a tensor well past the caches."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    timing = time_side_by_side({"copy": lambda: target.copy_(source)}, device, seconds=0.5, at_least=5)
    return 2 * source.numel() * source.element_size() / timing["copy"].median


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = time_side_by_side({"product": lambda: a @ b}, device, seconds=0.5, at_least=5)
    return 2 * size**3 / timing["product"].median
