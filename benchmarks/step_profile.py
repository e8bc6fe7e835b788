"""Where a model's step spends its time: python -m benchmarks.step_profile --models mdm_t2i_256 --batch 16

The kernels of a sampling step and of a training step, launched from Python, by torch's profiler: milliseconds and
launches a step, the slowest first; on a CPU, operations in place of kernels.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import SIZES, ModelCase
from mdm_kernels.tune import DTYPES

STEPS = 2
WIDTH = 130  # of a kernel's name


def profiled(step: Callable[[], None], device: torch.device) -> list[tuple[float, float, str]]:
    """List milliseconds a step, launches a step and the name of each kernel, on a CPU operation, the slowest first."""
    on_gpu = device.type == "cuda"
    for _ in range(STEPS):
        step()  # compiles kernels
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # A range of kernels, such as an optimizer's step, is none: these are listed by themselves.
    events = [event for event in found.key_averages() if event.device_type == where and not event.is_user_annotation]
    times = (event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events)
    rows = zip(times, events, strict=True)
    return sorted(((time / STEPS / 1000, event.count / STEPS, event.key) for time, event in rows), reverse=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mdm_t2i_256", metavar="NAMES", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of autocast (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--most", type=int, default=34, metavar="N", help="kernels to list (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for name in options.models.split(","):
        case = ModelCase(name, options.batch, DTYPES[options.dtype], device)
        steps = {"sampling": case.sampling_step, "training": functools.partial(case.training_step, seed=1)}
        for what, step in steps.items():
            case.model.train(what == "training")
            rows = profiled(step, device)
            print(f"{name}, {case.shape}, {what} step: {sum(time for time, _, _ in rows):.2f} ms")
            for time, launches, kernel in rows[: options.most]:
                print(f"{time:9.3f} ms {launches:7.1f}  {kernel[:WIDTH]}", flush=True)


if __name__ == "__main__":
    main()
