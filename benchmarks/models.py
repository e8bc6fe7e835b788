"""Each model's training step and sampling step on our ops and on plain PyTorch, with the same weights."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import launches
from benchmarks.launches import WayRow
from benchmarks.machine import Rates
from benchmarks.plain import plain_pytorch
from benchmarks.report import ModelRow
from benchmarks.timing import peak_memory, time_side_by_side
from mdm_models import UNet, create_model
from mdm_models.diffusion import MatryoshkaDiffusion, guide

# name → (height and width, frames) of its highest level
SIZES = {
    "mdm_t2i_tiny": (32, None),
    "mdm_t2v_tiny": (32, 8),
    "mdm_t2i_emoji_64": (64, None),
    "mdm_t2i_64": (64, None),
    "mdm_t2i_256": (256, None),
    "mdm_t2i_1024": (1024, None),
    "mdm_c2i_256": (256, None),
    "mdm_t2v_64": (64, 16),
    "mdm_t2v_256": (256, 16),
}
TEXT_TOKENS = 128


def default_names(device: torch.device, quick: bool) -> list[str]:
    """List the models to measure if none are named."""
    if quick:
        return ["mdm_t2v_tiny"]
    if device.type == "cpu":
        return ["mdm_t2i_tiny", "mdm_t2v_tiny", "mdm_t2i_64"]
    return list(SIZES)


class ModelCase:
    """A model with everything its steps need, on random images and text."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(0)
        self.name, self.batch, self.dtype, self.device = name, batch, dtype, device
        with device:
            self.model: UNet = create_model(name)
        config = self.model.config
        self.diffusion = MatryoshkaDiffusion(config.scales).to(device)
        size, frames = SIZES[name]
        self.shape = f"{batch}×" + (f"{frames}×" if frames else "") + f"{size}²"
        clip = (batch, 3, frames, size, size) if frames else (batch, 3, size, size)
        self.images = torch.rand(clip, device=device) * 2 - 1
        self.is_clip = frames is not None
        self.strides = config.strides  # (time, space) a level
        self.time = torch.randint(0, 1000, (batch,), device=device)
        self.context = torch.randn(batch, TEXT_TOKENS, config.innermost.context_dim, device=device)
        on_gpu = device.type == "cuda"  # where a graph may hold its step; launched by Python, that changes nothing
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True, capturable=on_gpu)

    def training_step(self, seed: int | None) -> None:
        """Make one training step: noise, predictions, loss, gradients, Adam; noise in the kernels from `seed`, or drawn
        if None."""
        noise = None if seed is not None else [torch.randn_like(level) for level in self._clean_levels()]
        x_t = self.diffusion.add_noise(self.images, self.time, self.strides, noise, seed=seed)
        with self._autocast():
            preds = self.model(x_t, self.time, self.context)
        loss = self.diffusion.per_sample_loss(preds, self.images, self.time, noise, seed=seed).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sampling_step(self) -> None:
        """Make one guided DDIM step: the model on a doubled batch, guidance, the reverse step."""
        x_t = self._clean_levels()
        with torch.inference_mode(), self._autocast():
            context = torch.cat([self.context, self.context])
            preds = self.model([torch.cat([x, x]) for x in x_t], torch.cat([self.time, self.time]), context)
            self.diffusion.step(x_t, guide(preds, 5.0), 500, 480, eta=0.0)

    def sampling_flops(self) -> int:
        """Count the floating-point operations of a sampling step's matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter, plain_pytorch():
            self.sampling_step()
        return counter.get_total_flops()

    def _clean_levels(self) -> list[torch.Tensor]:
        if not self.is_clip:
            return [self.images[:, :, ::space, ::space] for _, space in self.strides]
        return [self.images[:, :, ::time, ::space, ::space] for time, space in self.strides]

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class Step:
    """A step of a model, on our ops and on plain PyTorch."""

    ours: Callable[[], None]
    plain: Callable[[], None]
    work: float
    """floating-point operations, of a sampling step's"""


def steps(case: ModelCase) -> Iterator[tuple[str, Step]]:
    """Yield the training step and the sampling step by name, the model in the mode of each."""

    def on_plain(step: Callable[[], None]) -> Callable[[], None]:
        def call():
            with plain_pytorch():
                step()

        return call

    case.model.train()
    # forward once and backward twice, not doubled for guidance
    yield "training step", Step(lambda: case.training_step(seed=1), on_plain(lambda: case.training_step(None)), 1.5)
    case.model.eval()
    yield "sampling step", Step(case.sampling_step, on_plain(case.sampling_step), 1.0)


def measure(case: ModelCase, rates: Rates, seconds: float) -> Iterator[ModelRow]:
    """Yield a row for the training step and one for the sampling step, as Python launches them."""
    flops = case.sampling_flops()
    for name, step in steps(case):
        calls = {"ours": step.ours, "plain": step.plain}
        yield ModelRow(
            name=case.name,
            shape=case.shape,
            step=name,
            samples=case.batch,
            timings=time_side_by_side(calls, case.device, seconds=seconds),
            peaks={who: peak_memory(call, case.device) for who, call in calls.items()},
            floor=step.work * flops / rates.matrix,
        )


def measure_graphs(case: ModelCase, rates: Rates, seconds: float) -> Iterator[WayRow]:
    """Yield a row for ours and for plain PyTorch, as Python launches them and as captured graphs, in either step."""
    flops = case.sampling_flops()
    for name, step in steps(case):
        calls = {"ours": step.ours, "plain": step.plain}
        found = launches.outcomes(calls, case.device, seconds=seconds, graphed=calls)
        for who, outcome in found.items():
            yield WayRow(case.name, case.shape, name, who, outcome, step.work * flops / rates.matrix)
