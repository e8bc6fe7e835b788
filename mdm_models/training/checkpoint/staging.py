"""What each process copies of a run's state before it goes on, for a checkpoint to be written from."""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


def staged(state: dict, rank: int, world_size: int) -> dict[str, Any]:
    """Copy to the CPU what process `rank` is to write: the entries by their names in the checkpoint.

    state: nested dicts and lists of tensors and other values, with the same plain tensors on all processes.

    Of DTensors each process copies the part that it holds. Of plain tensors it copies a share of about equal size, so
    that together they copy them once: torch.distributed.checkpoint would share the writing too, but only after each
    process had copied everything, eight times the memory on a machine of eight GPUs. The rest is for rank 0.
    """
    entries = dict(_entries(state))
    owners = _owners({name: value.nbytes for name, value in entries.items() if _is_plain(value)}, world_size)
    mine = {
        name: value
        for name, value in entries.items()
        if isinstance(value, DTensor) or owners.get(name, 0) == rank
    }
    stager = DefaultStager(StagingOptions(False, False, False, False))  # that of torch 2.11 serves only once
    try:
        return cast(dict[str, Any], stager.stage(mine))  # a future only of one that works in the background
    finally:
        stager.close()


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a nested state, as torch.distributed.checkpoint makes them of a state to be loaded."""
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict | Tensor) for entry in value):
        inside = enumerate(value)
    else:
        yield name, value
        return
    for key, entry in inside:
        yield from _entries(entry, f"{name}.{key}" if name else str(key))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor)


def _owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank each tensor falls to: the largest first, each to the rank that has least so far."""
    owners, loads = {}, [0] * world_size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners
