"""What learns: the model with its objective, optimizer, averages and counters."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from mdm_models.config import UNetConfig
from mdm_models.data.stream import Batch, to_unit_range
from mdm_models.diffusion import MatryoshkaDiffusion
from mdm_models.diffusion.times import continuous_times, discrete_times, logit_normal_times
from mdm_models.errors import TrainingError
from mdm_models.pipeline import Pipeline
from mdm_models.processes import Processes
from mdm_models.text import TextEncoder, TransformerTextEncoder
from mdm_models.training.checkpoint.checkpoints import Checkpoints
from mdm_models.training.config import ObjectiveConfig, OptimizerConfig, TrainConfig, level_rows
from mdm_models.training.denoiser import CaptionReader, initial_model
from mdm_models.training.ema.averages import make_averages
from mdm_models.training.graphs import captured, uses_graphs
from mdm_models.training.parallel import accumulating, parallelise
from mdm_models.training.saved import pipeline_config, pipeline_of

NOISE, TIME = 4, 5  # what random numbers are for, beside 0 to 3 of the data's: no two uses draw the same ones


def times_of(objective: ObjectiveConfig, fractions: Tensor, num_steps: int) -> Tensor:
    """Map fractions in 0…1, uniform, to the times at which a batch is trained."""
    if objective.times == "logit_normal":
        return logit_normal_times(fractions, num_steps, objective.times_mean, objective.times_deviation)
    return {"discrete": discrete_times, "continuous": continuous_times}[objective.times](fractions, num_steps)


@dataclass(frozen=True)
class Outcome:
    """What one step measured, means over all processes: the loss, the gradient's norm before clipping, the learning
    rate, and each level's unweighted loss, highest resolution first; and whether any of them was asked to stop."""

    loss: float
    grad_norm: float
    lr: float
    level_losses: tuple[float, ...]
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the loss and the gradient's norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def summary(self) -> dict[str, float | list[float]]:
        """What the log takes of the last step of an interval."""
        return {"grad_norm": self.grad_norm, "lr": self.lr, "level_losses": list(self.level_losses)}


class Learner:
    """Learns step by step; what it holds is what a checkpoint holds.

    step: steps made, bad ones included; samples_seen: their samples, of all processes; bad_steps: those with a loss or
    gradient that was not finite, which change no weight.
    """

    def __init__(
        self,
        config: TrainConfig,
        architecture: UNetConfig,
        encoder: TextEncoder,
        processes: Processes,
        init_from: str = "",
    ):
        """init_from: run directory of the stage before, whose averages fill the nested model."""
        self.config = config
        self.architecture = architecture
        self.processes = processes
        self.encoder = encoder
        self.captions = CaptionReader(encoder, processes.device)
        self.model = initial_model(architecture, encoder, config.system.seed, init_from, processes.device)
        self.parallel = parallelise(self.model, config.system, processes)
        self.uses_graphs, self.has_graphs = uses_graphs(config, processes), False
        self.optimizer = _adam(self.model, config.optimizer)
        self.ema = make_averages(self.model, config.optimizer)
        self.diffusion = self._objective()
        self.level_weights = torch.tensor(self.diffusion.level_weights, device=processes.device)
        self.step = self.samples_seen = self.bad_steps = self.bad_in_a_row = 0

    def _objective(self) -> MatryoshkaDiffusion:
        how = self.config.objective
        return MatryoshkaDiffusion(
            self.architecture.noise_scales(self.config.data.size, how.unshifted_size),
            how.shift_power,
            prediction=how.prediction,
            loss_target=how.loss_target,
            level_weights=how.level_weights or None,
        ).to(self.processes.device)

    @property
    def lr(self) -> float:
        """The learning rate of the next step: linear warm-up, then constant, then linear to 0 at the end of the run."""
        told = self.config.optimizer
        rising = (self.step + 1) / max(1, told.warmup)
        falling = (told.steps - self.step) / told.cooldown if told.cooldown else 1.0
        return told.lr * min(1.0, rising, falling)

    def learn(self, chunks: Sequence[Batch], stop: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step on this process's chunks of the batch, one after another through the network.

        If the loss or the gradient is not finite, on any process, no process changes its weights. Raises TrainingError
        after `max_bad_steps` such steps in a row. stop: asked once, when the gradient is under way; what it says on one
        process, the outcome says on all, in the one message and at the one wait for the device that a step has.
        """
        measured = self._gradient(chunks)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        asked = torch.full_like(measured[:1], float(stop()))
        agreed = self.processes.mean(torch.cat([norm.float().view(1), measured, asked]))
        told = _reading(agreed)
        bad = 1 - agreed[:2].isfinite().all().float()
        vars(self.optimizer)["found_inf"] = bad  # where it is 1, fused Adam changes nothing
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        norm, loss, *levels, asked = told()
        outcome = Outcome(loss, norm, self.lr, tuple(levels), asked > 0)
        if outcome.finite:
            self.ema.update()
            self.bad_in_a_row = 0
        else:
            self.bad_steps += 1
            self.bad_in_a_row += 1
        self.step += 1
        self.samples_seen += sum(len(chunk.captions) for chunk in chunks) * self.processes.world_size
        if self.bad_in_a_row >= self.config.optimizer.max_bad_steps:
            raise TrainingError(f"no finite loss in {self.bad_in_a_row} steps in a row, the last of them {self.step}")
        return outcome

    def rehearse(self, chunks: Sequence[Batch]) -> float:
        """Measure the seconds that this process takes for the gradient of a step, which is then forgotten; the second
        of two, as the first one compiles and fills caches. All processes call it."""
        for _ in range(2):
            began = time.perf_counter()
            self._gradient(chunks)[0].item()  # on a GPU, this waits for it
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    def _gradient(self, chunks: Sequence[Batch]) -> Tensor:
        """Have the gradient of a step on this process's chunks; → (1 + levels,) its loss and the levels'."""
        self.optimizer.zero_grad(set_to_none=True)
        measured = torch.zeros(1 + len(self.architecture.levels), device=self.processes.device)
        for i, chunk in enumerate(chunks):
            with accumulating(self.parallel, more=i + 1 < len(chunks)):
                levels = self._level_losses(chunk, i * self.processes.world_size + self.processes.rank)
                loss = self.level_weights @ levels
                (loss / len(chunks)).backward()
            measured += torch.cat([loss.detach().view(1), levels.detach()]) / len(chunks)
        return measured

    def _level_losses(self, chunk: Batch, number: int) -> Tensor:
        """Each level's loss of the step's chunk of this number, without its weight: (levels,), with a graph.

        Noise, times and dropout follow from (seed, step, number) alone, whichever process computes the chunk.
        """
        entropy = self.config.system.seed, NOISE, self.step, number
        dropout, noise = np.random.SeedSequence(entropy).generate_state(2, np.uint64).tolist()
        noise >>= 1  # the kernels take 63 bits
        torch.manual_seed(dropout)
        images = to_unit_range(chunk.images.to(self.processes.device, non_blocking=True))
        if not self.architecture.is_video:
            images = images.squeeze(2)
        if self.config.system.channels_last:
            images = channels_last(images)
        time = self._times(len(images), number).to(self.processes.device, non_blocking=True)
        x = self.diffusion.add_noise(images, time, self.architecture.strides, seed=noise)
        x = [level[:rows] for level, rows in zip(x, self.level_rows(len(images)), strict=True)]
        captions = self.captions.read(chunk.captions)
        with self.autocast():
            if self.uses_graphs and not self.has_graphs:
                self.parallel, self.has_graphs = captured(self.parallel, x, time, captions), True
            predictions = self.parallel(x, time, captions)
        return self.diffusion.per_sample_loss(predictions, images, time, seed=noise, per_level=True).mean(1)

    def level_rows(self, count: int) -> list[int]:
        """How many of `count` samples are trained at each level."""
        return level_rows(self.config, self.architecture, count)

    def _times(self, count: int, number: int) -> Tensor:
        """(count,) times of a chunk; those of a whole step are spread evenly, which makes the loss less noisy (Kingma
        et al., "Variational Diffusion Models", 2021, appendix I.1), and dealt to its samples at random."""
        rng = np.random.default_rng((self.config.system.seed, TIME, self.step))
        total = self.config.optimizer.batch_size
        places = rng.permutation(total)[number * count : (number + 1) * count]
        fractions = torch.from_numpy((rng.random() + places / total) % 1)
        return times_of(self.config.objective, fractions, self.diffusion.num_steps)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Give a context that computes in bfloat16 if settings and device say so; where passes are captured it caches
        no weights."""
        device = self.processes.device.type
        in_bf16 = self.config.system.uses_bf16(device)
        return torch.autocast(device, torch.bfloat16, enabled=in_bf16, cache_enabled=not self.uses_graphs)

    @contextlib.contextmanager
    def as_pipeline(self) -> Iterator[Pipeline]:
        """Give the averaged model with the run's text encoder, precision and guidance as a pipeline, in evaluation mode
        and without gradients while the block lasts. Every process must enter it and call the pipeline equally often:
        with FSDP each of them holds a part of the weights."""
        self.model.eval()
        try:
            with self.ema.swapped_in(), torch.no_grad(), self.autocast():
                settings = pipeline_config(self.config, self.encoder)
                yield Pipeline(self.model.unet, _RunsText(self), settings, engine="eager")
        finally:
            self.model.train()

    def counters(self) -> dict[str, Any]:
        """Give the counts that a checkpoint keeps, by name."""
        return {name: getattr(self, name) for name in ("step", "samples_seen", "bad_steps", "bad_in_a_row")}

    def identity(self) -> dict:
        """Give what must be equal, of the UNet and the text encoder, for a checkpoint's weights to fit."""
        text = {"width": self.encoder.width}
        if isinstance(self.encoder, TransformerTextEncoder):
            text |= {"layers": self.config.model.text_layers, "tokens": self.config.model.text_tokens}
        return {"name": self.config.model.model, "unet": self.architecture.to_dict(), "text": text}

    def _state(self) -> dict:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "ema": self.ema.state_dict(),
            "counters": self.counters(),
        }

    def save(self, checkpoints: Checkpoints) -> None:
        """Begin to write a checkpoint; every process must call this."""
        checkpoints.save(self.step, self._state())

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continue from the newest checkpoint, if there is one; settings of the optimizer stay those of this run."""
        state = self._state()
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if not checkpoints.load_newest(state):
            return
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.ema.load_state_dict(state["ema"])
        for name, count in state["counters"].items():
            setattr(self, name, count)

    def export(self, directory: Path) -> None:
        """Write the averaged weights as a pipeline, to be sampled from; every process must call this."""
        with self.ema.swapped_in():
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)  # may be the parameters themselves, not copies
            if self.processes.is_main:
                averages = cast(dict[str, Tensor], weights)
                pipeline_of(self.config, self.architecture, self.encoder, averages).save_pretrained(directory)


class _RunsText:
    """The text encoder of a learner as a `TextEncoder`, wherever its weights lie."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self.width, self.max_tokens = learner.encoder.width, learner.encoder.max_tokens

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.learner.model.features(self.learner.captions.read(prompts))


def _adam(model: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    """Adam whose moments are there from the beginning, so that a checkpoint of any step has them."""
    adam = torch.optim.Adam(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    get_optimizer_state_dict(model, adam)  # makes them, by a step that changes no weight but is counted
    for state in adam.state.values():
        state["step"].zero_()
    return adam


def _reading(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy values from the device; the result waits for them, but not for what is asked of a GPU meanwhile."""
    copy = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)  # memory that is not pinned would wait
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read() -> list[float]:
        if copied is not None:
            copied.synchronize()
        return copy.tolist()

    return read


def channels_last(images: Tensor) -> Tensor:
    """Give the same images (B, C, H, W) or clips (B, C, T, H, W) with their channels innermost in memory."""
    return images.contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.channels_last_3d)
