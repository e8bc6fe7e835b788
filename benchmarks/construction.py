"""Time and memory that it takes to have a model: fresh, and from a saved directory.

  python benchmarks/construction.py [--model mdm_t2i_1024] [--repeats 3]

Each way runs in processes of its own. Times are the best of the repeats, memory is the peak above that after the
imports. "layer by layer" is the same model made as torch makes modules: each layer is initialised where it is made.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from mdm_models import NestedUNet, UNet, create_model, from_pretrained, model_config


def layer_by_layer(name: str) -> UNet:
    """Make a model as torch makes modules: each layer is initialised where it is made."""
    config = model_config(name)
    return (NestedUNet if config.inner else UNet)(config).to(memory_format=torch.channels_last)


WAYS = {
    "layer by layer": lambda name, saved: layer_by_layer(name),
    "create_model": lambda name, saved: create_model(name),
    "from_pretrained": lambda name, saved: from_pretrained(saved),
    "from_pretrained, bfloat16": lambda name, saved: from_pretrained(saved, dtype=torch.bfloat16),
}


def measure(way: str, name: str, saved: str) -> dict[str, float]:
    """Measure seconds, CPU seconds and GB of one way to make a model, in this process."""
    peak, wall, cpu = _peak(), time.perf_counter(), time.process_time()
    model = WAYS[way](name, saved)
    return {
        "s": time.perf_counter() - wall,
        "CPU s": time.process_time() - cpu,
        "peak GB": (_peak() - peak) / 1e9,
        "weights GB": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
    }


def _peak() -> int:
    """Bytes of the largest resident memory that this program has had. (getrusage counts that of the parent, too.)"""
    status = Path("/proc/self/status").read_text()
    if not (told := re.search(r"VmHWM:\s*(\d+) kB", status)):
        raise OSError("/proc/self/status has no VmHWM: this kernel does not tell a program's largest memory")
    return int(told[1]) * 1024


def best_of(repeats: int, way: str, name: str, saved: str) -> dict[str, float]:
    """Measure a way in `repeats` processes of its own; → the least of each number."""
    command = [sys.executable, __file__, "--model", name, "--way", way, "--saved", saved]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    return {column: min(run[column] for run in runs) for column in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mdm_t2i_1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.model, options.saved)))
        return
    with tempfile.TemporaryDirectory() as saved:
        create_model(options.model).save_pretrained(saved)
        print(f"{options.model}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for way in WAYS:
            row = best_of(options.repeats, way, options.model, saved)
            print(f"{way:26}", "  ".join(f"{value:.2f} {column}" for column, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
