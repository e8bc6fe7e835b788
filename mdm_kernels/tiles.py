"""The arithmetic of tiles, and the tiles that were measured to be fastest on a device.

`python -m mdm_kernels.tune` writes tuned/<device>.json; a file named by MDM_KERNELS_TILES comes before it. Where
neither has a kernel's tile, the launch's own rule says it.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from . import plans

TUNED = Path(__file__).parent / "tuned"

_tried: dict[str, dict] = {}


def next_power_of_2(size: int) -> int:
    """Give the least power of two that is no less than `size`; 1 for a size of 0. Triton's own costs microseconds."""
    return 1 << max(size - 1, 0).bit_length()


def count(size: int, block: int) -> int:
    """Count how many blocks of `block` cover `size`."""
    return -(-size // block)


def tuned(device: torch.device, key: str) -> dict[str, int] | None:
    """Give the tile and the launch options of what `key` says, a kernel and what its speed depends on; None if nobody
    measured them on this device."""
    if key in _tried:
        return _tried[key]
    if device.type != "cuda":
        return None
    return _measured(device.index or 0).get(key)


@contextlib.contextmanager
def trying(key: str, tile: dict[str, int]) -> Iterator[None]:
    """Inside the block, kernels of `key` run with this tile."""
    _tried[key] = tile
    plans.forget()
    try:
        yield
    finally:
        del _tried[key]
        plans.forget()


def file_of(device_name: str) -> Path:
    """Give the file of a device's tiles: NVIDIA H100 80GB HBM3 → tuned/nvidia-h100-80gb-hbm3.json"""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@functools.cache
def _measured(index: int) -> dict[str, dict]:
    path = Path(os.environ.get("MDM_KERNELS_TILES") or file_of(torch.cuda.get_device_name(index)))
    return json.loads(path.read_text())["tiles"] if path.exists() else {}
