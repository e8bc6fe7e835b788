"""Captioned clips or images from WebDataset shards, as an endless stream of batches.

Which sample stands at position p of the stream, where its clip starts and whether its caption is dropped are functions
of (seed, p) alone, so that a resumed run sees what an uninterrupted one would have, with any number of worker
processes, and ranks never run out at different times. A sample that cannot be used is skipped, another one takes its
place, and the skip travels with the batch to whoever counts.
"""

import itertools
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mdm_models.training.errors import DataError
from mdm_models.training.media import BadSample, decode_clip, decode_image
from mdm_models.training.shards import ShardedSamples

CLIP_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
ATTEMPTS = 200  # unusable samples in a row before the data set is given up


@dataclass(frozen=True)
class Skip:
    """A sample that was left out, and why."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class Batch:
    """images (B, 3, frames, size, size) uint8; B captions, "" where dropped; the samples skipped on the way."""

    images: Tensor
    captions: list[str]
    skipped: list[Skip]

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 −1…1, the same shape."""
    return images.float().div_(127.5).sub_(1)


def caption_of(sample: dict) -> str:
    """The caption of a sample: KEY.txt, or "caption" or "text" in KEY.json. Raises BadSample."""
    try:
        if "txt" in sample:
            caption = sample["txt"].decode()
        elif "json" in sample:
            fields = json.loads(sample["json"])
            caption = (fields.get("caption") or fields.get("text") or "") if isinstance(fields, dict) else None
        else:
            raise BadSample("caption missing", "neither .txt nor .json")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadSample("caption unreadable", str(error)) from None
    if not isinstance(caption, str):
        raise BadSample("caption unreadable", "the caption in .json is not a string")
    if not caption.strip():
        raise BadSample("caption empty")
    return caption.strip()


@dataclass(frozen=True)
class ClipReader:
    """Turns one sample of the shards into a clip of the wanted size: (3, frames, size, size) uint8 and its caption."""

    samples: ShardedSamples
    frames: int
    frame_rate: float
    size: int

    def damaged(self) -> list[Skip]:
        """The shards that break off midway."""
        return [
            Skip(shard.path, "the rest", "shard damaged", shard.damage) for shard in self.samples.shards if shard.damage
        ]

    def read(self, index: int, start: float = 0.0) -> tuple[Tensor, str]:
        """`start` as in `decode_clip`. Raises BadSample."""
        sample = self.samples[index]
        caption = caption_of(sample)
        for suffix in CLIP_SUFFIXES:
            if suffix in sample:
                return decode_clip(sample[suffix], self.frames, self.frame_rate, self.size, start), caption
        for suffix in IMAGE_SUFFIXES:
            if suffix in sample:
                if self.frames > 1:
                    raise BadSample("too short", f"an image, where clips of {self.frames} frames are wanted")
                return decode_image(sample[suffix], self.size), caption
        found = ", ".join(f".{suffix}" for suffix in sample if not suffix.startswith("__"))
        raise BadSample("no clip or image", f"the sample holds {found or 'nothing'}")

    def try_read(self, index: int, start: float = 0.0) -> tuple[Tensor, str] | Skip:
        """`read`, with a Skip for what went wrong."""
        shard = self.samples.shard_of(index).path
        key = f"sample {index}"
        try:
            return self.read(index, start)
        except BadSample as bad:
            key = self.samples[index]["__key__"]
            return Skip(shard, key, bad.reason, bad.detail)
        except (OSError, tarfile.TarError) as error:
            return Skip(shard, key, "shard unreadable", f"{error}")


class ClipStream(Dataset):
    """Position in the stream → (clip or None, caption, skipped samples); None if nothing usable was found."""

    def __init__(self, reader: ClipReader, indices: np.ndarray, seed: int, caption_dropout: float):
        self.reader = reader
        self.indices = indices
        self.seed = seed
        self.caption_dropout = caption_dropout
        self._order: tuple[int, np.ndarray] | None = None  # epoch and its permutation
        self._bad: dict[int, Skip] = {}  # known to be unusable: not decoded again

    def __getitem__(self, position: int) -> tuple[Tensor | None, str, list[Skip]]:
        epoch, offset = divmod(position, len(self.indices))
        draw = np.random.default_rng((self.seed, 1, position))
        start, drop = draw.random(), draw.random() < self.caption_dropout
        index = self._permutation(epoch)[offset]
        skipped: list[Skip] = []
        for _ in range(ATTEMPTS):
            found = self._bad.get(index) or self.reader.try_read(index, start)
            if not isinstance(found, Skip):
                clip, caption = found
                return clip, "" if drop else caption, skipped
            self._bad[index] = found
            skipped.append(found)
            index = draw.choice(self.indices)
        return None, "", skipped

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(self.indices)
        return self._order[1]


def split(count: int, holdout: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and the validation samples: one in `holdout` is held out (0: none), whatever the seed."""
    order = np.random.default_rng(0).permutation(count)
    held = count // holdout if holdout else 0
    return np.sort(order[held:]), np.sort(order[:held])


def batches(
    stream: ClipStream, batch_size: int, *, samples_seen: int, rank: int, world: int, workers: int, pin: bool = False
) -> Iterator[Batch]:
    """Batches without end for one rank of `world`, from the position `samples_seen` of the stream on.

    Raises DataError when ATTEMPTS samples in a row could not be used.
    """
    first = itertools.count(samples_seen + rank * batch_size, world * batch_size)
    loader = DataLoader(
        stream,
        batch_sampler=(range(start, start + batch_size) for start in first),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_stand_apart,
    )
    for batch in loader:
        if len(batch.captions) < batch_size:
            reasons = sorted({f"{skip.reason} ({skip.detail})" for skip in batch.skipped})
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            raise DataError(
                f"data: {ATTEMPTS} samples in a row cannot be used, the last of them {batch.skipped[-1].key} in "
                f"{batch.skipped[-1].shard}: {'; '.join(reasons[:3])}{more}"
            )
        yield batch


def _collate(items: list[tuple[Tensor | None, str, list[Skip]]]) -> Batch:
    """One batch; shorter than asked if nothing usable was found for an item."""
    usable = [(clip, caption) for clip, caption, _ in items if clip is not None]
    images = torch.stack([clip for clip, _ in usable]) if usable else torch.zeros(0, dtype=torch.uint8)
    skipped = list(dict.fromkeys(skip for _, _, skips in items for skip in skips))
    return Batch(images, [caption for _, caption in usable], skipped)


def _stand_apart(worker: int) -> None:
    """Ctrl-C and torchrun signal a whole process group, but workers must live until their parent has saved: it then
    ends them by SIGTERM, whose handler they must not inherit."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
