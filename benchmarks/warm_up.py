"""Fill Triton's cache on all cores before tests and benchmarks: python -m benchmarks.warm_up --cases quick --models a,b

A kernel is compiled where it is launched first, one after the other; here all that the benchmark's cases and the
models' steps would launch are learnt from meta tensors and compiled beside each other, for the GPU that is there.
"""

import argparse
import contextlib
import sys
import time

import torch

import mdm_kernels as mk
from benchmarks import shapes
from benchmarks.case import Case, Place
from benchmarks.models import SIZES, TEXT_TOKENS
from mdm_kernels import backend
from mdm_kernels.aot.compiler import Launch, compile_all, jobs
from mdm_kernels.aot.gpu_layouts import GPULayouts
from mdm_kernels.aot.machine_code import TARGETS
from mdm_kernels.tune import DTYPES
from mdm_models import create_model

META = torch.device("meta")
CASES = {
    "none": lambda place: [],
    "quick": shapes.quick_gpu_cases,
    "all": shapes.gpu_cases,
    "experiments": shapes.experimental_cases,
}
STEPS = ((1, False), (2, False), (16, True))
"""Batch of a model's call, and whether it is one of training."""


def run_case(case: Case) -> None:
    """Run a case forward, and backward where it has that."""
    if case.ours is None:
        return
    inputs = case.inputs()
    count = len(case.sample_dims) if case.differentiated is None else case.differentiated
    with torch.no_grad():
        case.ours(*inputs)
    if case.backward_bytes:
        leaves = [x.detach().requires_grad_() for x in inputs[:count]]
        out = case.ours(*leaves, *inputs[count:])
        torch.autograd.grad(out, leaves, torch.empty_like(out))


def run_model(name: str, batch: int, train: bool) -> None:
    """Call a model in bfloat16, with a text mask and without; in training noise, loss and backward around it, and norms
    in float32."""
    with META:
        model = create_model(name).to(torch.bfloat16)
        config, (size, frames) = model.config, SIZES[name]
        images = torch.empty((batch, 3, frames, size, size) if frames else (batch, 3, size, size))
        x = [images[:, :, ::t, ::s, ::s] if frames else images[:, :, ::s, ::s] for t, s in config.strides]
        time, alpha_bars = torch.empty(batch), torch.empty(len(x), batch)
        context = torch.empty(batch, TEXT_TOKENS, config.innermost.context_dim, dtype=torch.bfloat16)
        mask = torch.empty(batch, TEXT_TOKENS, dtype=torch.bool)
    if not train:
        with torch.no_grad():
            for context_mask in (None, mask):
                model(x, time, context, context_mask)
        return
    for module in model.modules():
        if isinstance(module, mk.GroupNormSiLU):
            module.float()
    strides = config.strides if frames else [s for _, s in config.strides]
    mk.multires_noise(images, alpha_bars, strides, seed=1)
    predictions = model(x, time, context, mask)
    mk.multires_loss(predictions, images, alpha_bars, strides, seed=1).mean().backward()


def launches(cases: str, models: list[str], dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """List what the cases, in this dtype, and the models' steps launch, each specialization once."""
    found: dict[str, Launch] = {}

    def add(kernel, arguments):
        launch = Launch("warm-up", kernel, arguments)
        found.setdefault(launch.specialization, launch)

    with mk.use_backend("triton"), backend.recording(add), GPULayouts():
        for case in CASES[cases](Place(META, dtype)):
            if case.ours and "diffusers" not in case.op:
                for context in (contextlib.nullcontext, *case.experiments.values()):
                    with context():
                        run_case(case)
        for name in models:
            for batch, train in STEPS:
                run_model(name, batch, train)
    return list(found.values())


def this_gpu() -> str:
    """Name the architecture of the GPU that is there, such as sm_90 or gfx942."""
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_properties().gcnArchName.split(":")[0] if torch.version.hip else f"sm_{major}{minor}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=CASES, default="quick", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the cases (default: %(default)s)")
    parser.add_argument("--models", default="", metavar="NAMES", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--target", choices=TARGETS, help="compile for it (default: the GPU that is there)")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--most", type=int, metavar="N", help="compile no more than N kernels: a rehearsal")
    options = parser.parse_args(arguments)
    target = options.target or this_gpu()
    if target not in TARGETS:
        print(f"{target} is none of {', '.join(TARGETS)}: kernels are compiled where they are launched", flush=True)
        return 0
    learnt = time.time()
    found = launches(options.cases, [name for name in options.models.split(",") if name], DTYPES[options.dtype])
    began = time.time()
    work = jobs(found[: options.most], [target])
    results = [result for _, result in compile_all(work, instructions=False, processes=options.processes)]
    faults = [f"{result.label}: {result.error}" for result in results if result.error]
    print(
        f"{len(found)} kernels learnt in {began - learnt:.0f} s, {len(work)} compiled for {target} in "
        f"{time.time() - began:.0f} s, {len(faults)} failed",
        *faults, sep="\n", flush=True,
    )  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
