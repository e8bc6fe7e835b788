"""What learns: the model with its objective, optimizer, averages and counters."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdm_models.config import UNetConfig
from mdm_models.diffusion import MatryoshkaDiffusion, discrete_times
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder
from mdm_models.training import checkpoint as checkpoints
from mdm_models.training.checkpoint import Checkpoint
from mdm_models.training.config import TrainConfig
from mdm_models.training.data import Batch, to_unit_range
from mdm_models.training.distributed import Place
from mdm_models.training.ema import EMA
from mdm_models.training.errors import CheckpointError, TrainingError
from mdm_models.unet import build_model


@dataclass(frozen=True)
class Outcome:
    """What one step measured, means over all processes: the loss, the gradient's norm before clipping, the learning
    rate and, where asked for, each level's unweighted loss, highest resolution first."""

    loss: float
    grad_norm: float
    lr: float
    level_losses: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def summary(self) -> dict[str, float | list[float]]:
        """What the log takes of the last step of an interval."""
        return {"grad_norm": self.grad_norm, "lr": self.lr, "level_losses": list(self.level_losses)}


class CaptionedDenoiser(nn.Module):
    """The text encoder and the UNet as one: x_t of every level, time (B,), tokens (B, S) → predictions."""

    def __init__(self, architecture: UNetConfig, config: TrainConfig):
        super().__init__()
        self.text = TransformerTextEncoder(config.text_width, config.text_layers, max_tokens=config.text_tokens)
        self.unet = build_model(architecture)

    def forward(self, x: list[Tensor], time: Tensor, tokens: Tensor) -> list[Tensor]:
        context, mask = self.text(tokens)
        return self.unet(x, time, context, mask)


class Learner:
    """Learns from one batch at a time; what it holds is what a checkpoint holds.

    step: batches learned from, bad ones included; samples_seen: their samples, of all processes; bad_steps: those with
    a loss or gradient that was not finite, which change no weight.
    """

    def __init__(self, config: TrainConfig, architecture: UNetConfig, place: Place):
        self.config = config
        self.architecture = architecture
        self.place = place
        torch.manual_seed(config.seed)
        self.model = CaptionedDenoiser(architecture, config).to(place.device)
        self.parallel = DistributedDataParallel(self.model) if place.world > 1 else self.model
        self.ema = EMA(self.model, config.ema_decay)
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, betas=betas, eps=config.eps, fused=True
        )
        self.diffusion = self._objective(config.level_weights or None)
        levels = range(len(architecture.levels))
        self.one_level = [self._objective([float(i == level) for i in levels]) for level in levels]
        self.step = self.samples_seen = self.bad_steps = self.bad_in_a_row = 0

    def _objective(self, level_weights: Sequence[float] | None) -> MatryoshkaDiffusion:
        scales, power = self.architecture.scales, self.config.shift_power
        return MatryoshkaDiffusion(scales, power, level_weights=level_weights).to(self.place.device)

    @property
    def lr(self) -> float:
        """Linear warm-up, then constant."""
        return self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup))

    def learn(self, batch: Batch, measure_levels: bool = False) -> Outcome:
        """One optimizer step, on this process's share of the batch.

        If the loss or the gradient is not finite, on any process, no process changes its weights. Raises TrainingError
        after `config.max_bad_steps` such steps in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        predictions, images, time, seed = self._predict(batch)
        loss = self.diffusion.per_sample_loss(predictions, images, time, seed=seed).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        measured = [loss.detach(), norm]
        if measure_levels:
            detached = [prediction.detach() for prediction in predictions]
            measured += [level.per_sample_loss(detached, images, time, seed=seed).mean() for level in self.one_level]
        outcome = self._agreed(measured)
        if outcome.finite:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            self.optimizer.step()
            self.ema.update()
            self.bad_in_a_row = 0
        else:
            self.bad_steps += 1
            self.bad_in_a_row += 1
        self.step += 1
        self.samples_seen += len(batch.captions) * self.place.world
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingError(f"no finite loss in {self.bad_in_a_row} steps in a row, the last of them {self.step}")
        return outcome

    def _agreed(self, measured: list[Tensor]) -> Outcome:
        loss, norm, *levels = self.place.mean(torch.stack([value.float() for value in measured])).tolist()
        return Outcome(loss, norm, self.lr, tuple(levels))

    def _predict(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor, int]:
        """→ predictions, images, times (B,) and the seed of the noise, all from (seed, step, rank) alone."""
        state = np.random.SeedSequence((self.config.seed, self.step, self.place.rank)).generate_state(2)
        torch.manual_seed(int(state[0]))  # dropout
        seed = int(state[1])
        images = to_unit_range(batch.images.to(self.place.device, non_blocking=True))
        if not self.architecture.is_video:
            images = images.squeeze(2)
        time = self._times(len(images)).to(self.place.device)
        x = self.diffusion.add_noise(images, time, self.architecture.strides, seed=seed)
        tokens = self.model.text.tokenize(batch.captions).to(self.place.device)
        with self.autocast():
            predictions = self.parallel(x, time, tokens)
        return predictions, images, time, seed

    def _times(self, count: int) -> Tensor:
        """(count,) int64, each uniform in 0…num_steps−1 and all processes' together spread evenly, which makes the loss
        less noisy (Kingma et al., "Variational Diffusion Models", 2021, appendix I.1)."""
        offset = np.random.default_rng((self.config.seed, self.step)).random()
        positions = self.place.rank * count + np.arange(count)
        fractions = (offset + positions / (count * self.place.world)) % 1
        return discrete_times(torch.from_numpy(fractions), self.diffusion.num_steps)

    def autocast(self) -> contextlib.AbstractContextManager:
        on = self.config.precision == "bf16" or (self.config.precision == "auto" and self.place.device.type == "cuda")
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=on)

    def counters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("step", "samples_seen", "bad_steps", "bad_in_a_row")}

    def identity(self) -> dict:
        """What must be equal for weights to fit."""
        text = {"layers": self.config.text_layers, "tokens": self.config.text_tokens}
        return {"name": self.config.model, "unet": self.architecture.to_dict(), "text": text}

    def save(self, run: Path) -> Path:
        """Write a checkpoint into the run directory; for the leading process only."""
        counters = self.counters() | {"ema_updates": self.ema.updates}
        state = Checkpoint(self.model.state_dict(), self.ema.averages, self.optimizer.state_dict(), counters)
        return checkpoints.save(run, state, self.identity(), self.config.keep)

    def export(self, directory: Path) -> None:
        """Write the averaged weights as a pipeline, to be sampled from; for the leading process only."""
        config = PipelineConfig(
            size=self.config.size,
            max_tokens=self.config.text_tokens,
            shift_power=self.config.shift_power,
            guidance_scale=self.config.guidance_scale,
            frame_rate=self.config.frame_rate,
        )
        with self.ema.swapped_in():
            Pipeline(self.model.unet, self.model.text, config).save_pretrained(directory)

    def resume(self, run: Path) -> None:
        """Continue from the newest checkpoint in the run directory; start from `config.init_from` if there is none."""
        state = checkpoints.load_newest(run, self.identity())
        if state is None:
            if self.config.init_from:
                self._start_from(Path(self.config.init_from))
            return
        counters = dict(state.counters)
        self.model.load_state_dict(state.model)
        self.ema.load(state.ema, counters.pop("ema_updates"))
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state.optimizer["state"]})
        for name, count in counters.items():
            setattr(self, name, count)

    def _start_from(self, stage: Path) -> None:
        """Fill the nested UNet and the text encoder with the averages of a finished run, every weight of both."""
        averages = checkpoints.load_averages(stage)
        for prefix, module in (("text.", self.model.text), ("unet.", getattr(self.model.unet, "inner", None))):
            if module is None:
                raise CheckpointError(f"init_from {stage}: {self.config.model} has no nested UNet to fill")
            own = {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise CheckpointError(f"init_from {stage}: its {prefix[:-1]} does not fit: {reason[:300]}") from None
        self.ema = EMA(self.model, self.config.ema_decay)
