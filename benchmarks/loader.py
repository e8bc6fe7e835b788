"""How many samples a second our loader gives beside plain webdataset: python -m benchmarks.loader [--profile]

Both read the same shards of JPEGs of 256² with captions, decode them to uint8 (3, 256, 256) and batch them, with 0, 1
and 2 processes that decode. They take turns of so many batches that what a process has ready when its turn begins is a
small part of them. The ratio is of medians of one run, above 1 where ours is faster; on a machine with other work it
tells more than the rates.
--profile: where one thread's time goes in each, in place of that.
"""

import argparse
import cProfile
import io
import itertools
import json
import pstats
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.machine import device_name
from benchmarks.report import markdown_table
from benchmarks.timing import Timing, time_side_by_side
from mdm_models.data.config import DataConfig
from mdm_models.data.reader import SampleReader
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import SampleStream, batches, split

SIZE = 256
OURS, PLAIN = "ours", "webdataset"
wds: Any = webdataset  # whose own types leave out most of its names
WORDS = ("red", "green", "small", "large", "house", "tree", "river", "cat", "dog", "under", "beside", "with", "two")


def write_shards(folder: Path, shards: int, samples: int) -> list[str]:
    """Write shards of `samples` pictures each, smooth with some noise, as photographs are, and captions of 5 to 20
    words."""
    rng, words = np.random.default_rng(0), random.Random(0)
    paths = []
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        with wds.TarWriter(str(path), encoder=False) as tar:
            for i in range(samples):
                coarse = Image.fromarray(rng.integers(256, size=(12, 12, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
                pixels = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "JPEG", quality=90)
                caption = " ".join(words.choices(WORDS, k=words.randint(5, 20)))
                tar.write({"__key__": f"{number:05d}{i:05d}", "jpg": picture.getvalue(), "txt": caption.encode()})
        paths.append(str(path))
    return paths


def ours(shards: list[str], batch_size: int, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield batches as a training run reads them: images (B, 3, SIZE, SIZE) uint8 and their captions."""
    config = DataConfig(tuple(shards), size=SIZE, frames=1, holdout=0.0)
    samples = ShardedSamples(open_shards(config))
    stream = SampleStream(SampleReader(samples, config), split(samples, 0.0)[0], seed=0, caption_dropout=0.1)
    for batch in batches(stream, batch_size, first_chunk=0, rank=0, world_size=1, workers=workers):
        yield batch.images.squeeze(2), batch.captions


def plain(shards: list[str], batch_size: int, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield batches as webdataset's documentation has it: shards in random order, a shuffle buffer, decoding."""
    per_worker = {"resampled": True, "nodesplitter": wds.split_by_node, "workersplitter": wds.split_by_worker}
    dataset = (
        wds.WebDataset(shards, shardshuffle=False, **per_worker)
        .shuffle(1000, initial=100)
        .decode("rgb8")
        .to_tuple("jpg", "txt")
        .map_tuple(lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), lambda caption: caption)
        .batched(batch_size, collation_fn=lambda pairs: (torch.stack([p for p, _ in pairs]), [c for _, c in pairs]))
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=workers)


LOADERS: dict[str, Callable[..., Iterable[tuple[Tensor, list[str]]]]] = {OURS: ours, PLAIN: plain}


def measured(shards: list[str], workers: int, batch_size: int, turn: int, seconds: float) -> dict[str, Timing]:
    """Measure the seconds a sample of each loader. turn: batches that it gives before it is the other's turn."""
    made = {name: iter(loader(shards, batch_size, workers)) for name, loader in LOADERS.items()}

    def take(name: str) -> None:
        for images, captions in itertools.islice(made[name], turn):
            assert images.shape == (batch_size, 3, SIZE, SIZE)
            assert len(captions) == batch_size

    calls = {name: lambda name=name: take(name) for name in made}
    timings = time_side_by_side(calls, torch.device("cpu"), seconds=seconds)
    return {name: timing.of_one_among(turn * batch_size) for name, timing in timings.items()}


def profile(shards: list[str], batch_size: int, count: int) -> None:
    """Print what each loader spends its CPU time on in `count` batches, decoded in this process."""
    for name, loader in LOADERS.items():
        drawn = iter(loader(shards, batch_size, 0))
        next(drawn)
        with cProfile.Profile(time.process_time) as profiler:  # this process's alone, whatever else is at work
            for _ in itertools.islice(drawn, count):
                pass
        print(f"{name}: {count * batch_size} samples")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that decode")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turn", type=int, default=32, help="batches that one of both gives before the other")
    parser.add_argument("--seconds", type=float, default=30, help="for each loader and number of processes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--profile", action="store_true", help="where one thread's time goes")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), told.shards, told.samples)
        if told.profile:
            return profile(shards, told.batch_size, told.turn)
        found = {w: measured(shards, w, told.batch_size, told.turn, told.seconds) for w in told.workers}
    device = device_name(torch.device("cpu"))
    print(f"JPEGs of {SIZE}² with captions, {device}; samples/s, median (slowest to fastest)\n")
    print(markdown_table(("workers", OURS, PLAIN, "ratio"), [_cells(w, timings) for w, timings in found.items()]))
    if told.json:
        rates = {w: {name: 1 / timing.median for name, timing in timings.items()} for w, timings in found.items()}
        told.json.write_text(json.dumps({"device": device, "samples/s": rates}, indent=1) + "\n")


def _cells(workers: int, timings: dict[str, Timing]) -> tuple[str, ...]:
    rates = [f"{1 / t.median:.0f} ({1 / t.slowest:.0f} to {1 / t.fastest:.0f})" for t in timings.values()]
    return str(workers), *rates, f"{timings[PLAIN].median / timings[OURS].median:.2f}"


if __name__ == "__main__":
    main()
