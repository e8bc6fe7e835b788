"""How long a training run stands still for a checkpoint: python -m benchmarks.checkpoints [--millions 100]

Times, of a state of that many parameters (weights, averages and Adam's two moments: 16 bytes a parameter), `save`
until it returns, which is what a step waits for, beside `save` and `finish`, after which all of it is on the disk with
its checksums; and the floors of the two: one copy of the state in memory, one write of it to the same disk.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import device_name
from benchmarks.timing import time_side_by_side
from mdm_models.processes import Processes
from mdm_models.storage import sync
from mdm_models.training.checkpoint.checkpoints import Checkpoints

LAYER = 1_000_000  # parameters


def state(millions: int) -> dict[str, dict]:
    """Make a state of weights, averages and moments, each in layers of a million parameters."""
    parts = [{f"layer{i}": torch.full((LAYER,), float(i)) for i in range(millions)} for _ in range(4)]
    model, ema, mean, square = parts
    return {"model": model, "ema": ema, "optimizer": {"mean": mean, "square": square}, "counters": {"step": 0}}


def tensors(part: dict) -> list[Tensor]:
    return [leaf for value in part.values() for leaf in (tensors(value) if isinstance(value, dict) else [value])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100, help="parameters")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder of temporary files")
    arguments = parser.parse_args()

    saved = state(arguments.millions)
    everything = tensors({name: part for name, part in saved.items() if name != "counters"})
    size = sum(tensor.nbytes for tensor in everything)
    stalls = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Checkpoints(Path(folder), {"name": "benchmark"}, 1, Processes(0, 1, torch.device("cpu")))

        def save_and_finish() -> None:
            saved["counters"]["step"] += 1
            begun = time.perf_counter()
            checkpoints.save(saved["counters"]["step"], saved)
            stalls.append(time.perf_counter() - begun)
            checkpoints.finish()

        def write_once() -> None:
            path = Path(folder) / "floor"
            with path.open("wb") as file:
                for tensor in everything:
                    file.write(tensor.numpy().data)
            sync(path)
            path.unlink()

        calls = {
            "save until on the disk": save_and_finish,
            "floor: one write": write_once,
            "floor: one copy": lambda: [tensor.clone() for tensor in everything],
        }
        timings = time_side_by_side(calls, torch.device("cpu"), seconds=1)

    print(f"{arguments.millions} million parameters, {size / 1e9:.1f} GB, torch {torch.__version__}")
    print(f"{device_name(torch.device('cpu'))}; median (fastest to slowest), seconds")
    rows = {name: (t.median, t.fastest, t.slowest) for name, t in timings.items()}
    stalls = sorted(stalls[1:])  # the first one warmed up
    rows = {"save until it returns": (stalls[len(stalls) // 2], stalls[0], stalls[-1])} | rows
    for name, (median, fastest, slowest) in rows.items():
        print(f"{name:24s}{median:8.2f}  ({fastest:.2f} to {slowest:.2f})")


if __name__ == "__main__":
    main()
