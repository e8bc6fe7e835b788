"""Clips and single pictures in one batch, from shards of their own.

Chunk g of the mixed stream is chunk g of the clips and, behind it, chunk g of the pictures: each stream is what it
would be alone (see `stream.py`), and a mixed run goes on as exactly.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mdm_models.data.config import DataConfig
from mdm_models.data.stream import Batch, SampleStream, batches


def kinds_of(config: DataConfig) -> list[DataConfig]:
    """The settings of the clips, or whatever the data are, and of the pictures beside them, if there are any: each is
    read by its own."""
    clips = dataclasses.replace(config, images=(), image_share=0.0)
    return [clips, dataclasses.replace(clips, shards=config.images, frames=1)] if config.images else [clips]


def mixed_batches(
    parts: Sequence[tuple[SampleStream, int]],
    *,
    first_chunk: int,
    rank: int,
    world_size: int,
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield chunks of several streams, each with so many samples in it; see `stream.batches`. `workers` decode for
    each.

    A picture among clips stands still: it is repeated to as many frames as the first stream has.
    """
    how: dict[str, Any] = {"first_chunk": first_chunk, "rank": rank, "world_size": world_size, "workers": workers}
    if len(parts) == 1:
        [(stream, count)] = parts
        return batches(stream, count, **how, pin=pin)
    return _joined([batches(stream, count, **how) for stream, count in parts], pin)


def _joined(streams: Sequence[Iterator[Batch]], pin: bool) -> Iterator[Batch]:
    for chunks in zip(*streams, strict=True):
        frames = chunks[0].images.shape[2]
        images = torch.cat([chunk.images.expand(-1, -1, frames, -1, -1) for chunk in chunks])
        yield Batch(
            images.pin_memory() if pin else images,
            [caption for chunk in chunks for caption in chunk.captions],
            [skip for chunk in chunks for skip in chunk.skipped],
        )
