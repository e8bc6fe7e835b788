"""What a run would be, said before it begins: settings, model, memory, schedule; without data, device or downloads."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

from torch import nn

from mdm_models.config import UNetConfig
from mdm_models.errors import TrainingError
from mdm_models.text import load_text_encoder
from mdm_models.text.load import NUMBERED
from mdm_models.text.precomputed import UNCONDITIONAL
from mdm_models.training.config import ModelConfig, Plan, TrainConfig, chunks_of, level_rows, level_shares, plan
from mdm_models.training.denoiser import CaptionedDenoiser
from mdm_models.training.dry_run.footprint import activation_bytes, level_flops, training_flops, weightless_model
from mdm_models.training.parallel import BLOCKS
from mdm_models.zoo import model_config

FLOAT32, BFLOAT16, FLOAT16 = 4, 2, 2  # bytes of a number


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a process needs at the height of a step, but for what libraries take for themselves."""

    weights: float
    gradients: float
    adam: float
    averages: float
    activations: float
    """kept for the backward pass of one chunk, with copies of the weights in bfloat16 where it computes in that"""
    gradients_in_flight: float
    """of activations, inside a block"""
    gathered: float
    """under FSDP: the two largest parts whose weights are gathered, in the dtype that is computed in, one computing and
    the next one on its way"""

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def describe(config: TrainConfig, world_size: int = 1, architecture: UNetConfig | None = None) -> str:
    """Describe a run on so many processes in several lines, for people; architecture: as in `train`. Raises
    TrainingError for settings that do not fit."""
    planned = plan(config, architecture, context_dim=_feature_width(config.model))
    chunk, rounds = chunks_of(config.optimizer, world_size)
    model = weightless_model(planned.architecture, config.model)
    devices = ["cuda", "cpu"] if config.system.device == "auto" else [config.system.device]
    lines = [
        "settings (* differs from the default)",
        *_settings(config),
        "",
        *_model(config, planned, model),
        "",
        f"memory of each of {world_size} processes in GB (10⁹ bytes), at most",
        *(_memory_line(estimate_memory(config, planned, world_size, device), device, chunk) for device in devices),
        "",
        *_schedule(config, model, world_size, chunk, rounds),
    ]
    return "\n".join(lines)


def estimate_memory(config: TrainConfig, planned: Plan, world_size: int, device: str) -> Memory:
    """Estimate the memory of each process on a device of that type, "cuda" or "cpu"."""
    model = weightless_model(planned.architecture, config.model)
    chunk, _ = chunks_of(config.optimizer, world_size)
    sharded = config.system.parallel == "fsdp" and world_size > 1
    in_bf16 = config.system.uses_bf16(device)
    weights = _parameters(model) * FLOAT32 / (world_size if sharded else 1)
    activations = activation_bytes(
        planned.architecture,
        config.model,
        tuple(planned.shapes),
        level_rows(config, planned.architecture, chunk),
        device,
        autocast=in_bf16,
        recompute=config.system.checkpoint_activations,
    )
    return Memory(
        weights=weights,
        gradients=weights,
        adam=2 * weights,
        averages=weights * _averages(config),
        activations=activations.kept,
        gradients_in_flight=activations.in_flight,
        gathered=sum(sorted(_unit_sizes(model))[-2:]) * (BFLOAT16 if in_bf16 else FLOAT32) if sharded else 0,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _unit_sizes(model: CaptionedDenoiser) -> Iterator[int]:
    """The parameters of what FSDP gathers at a time, see `parallelise`: each block, and what is left around them."""
    for network in filter(None, [model.text, model.unet]):
        blocks = [_parameters(module) for module in network.modules() if isinstance(module, BLOCKS)]
        yield from blocks
        yield _parameters(network) - sum(blocks)


def _averages(config: TrainConfig) -> int:
    """How many averages of the weights are tracked."""
    return max(1, len(config.optimizer.ema_stds))


def _feature_width(config: ModelConfig) -> int | None:
    """The width of a frozen encoder's features; None if the encoder is trained along. An encoder whose weights would
    have to be read or downloaded for this is taken to be as wide as the features that the named model reads."""
    encoder = config.text_encoder
    if not encoder:
        return None
    path = Path(encoder)
    try:
        if encoder.startswith(NUMBERED) or path.is_file() or (path / UNCONDITIONAL).is_file():
            return load_text_encoder(encoder, max_tokens=config.text_tokens).width
        return model_config(config.model).innermost.context_dim
    except ValueError as error:
        raise TrainingError(" ".join(str(error).split())) from None


def _settings(config: TrainConfig) -> Iterator[str]:
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if not dataclasses.is_dataclass(value):
            yield f"  {part.name} {value}"
            continue
        yield f"  {part.name}"
        for field in dataclasses.fields(value):
            chosen = getattr(value, field.name)
            mark = " " if field.default is MISSING or chosen == field.default else "*"
            yield f"  {mark} {field.name:22} {_shown(chosen)}"


def _shown(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value) or "none"


def _model(config: TrainConfig, planned: Plan, model: CaptionedDenoiser) -> Iterator[str]:
    text = "and its text encoder" if model.text else f"without the text encoder {config.model.text_encoder}"
    yield f"model {config.model.model}: {_parameters(model):,} parameters {text}"
    forward = level_flops(planned.architecture, config.model, tuple(planned.shapes))
    levels = len(forward)
    shares = level_shares(config, planned.architecture)
    weights = config.objective.level_weights or (1.0,) * levels
    yield f"  {'level':16}{'noise shift':>12}{'share':>8}{'weight':>8}{'parameters':>14}{'GFLOP forward':>15}"
    unet: nn.Module = model.unet
    scales = planned.architecture.noise_scales(config.data.size, config.objective.unshifted_size)
    for i, shape in enumerate(planned.shapes):
        inner = getattr(unet, "inner", None)
        own = _parameters(unet) - (_parameters(inner) if isinstance(inner, nn.Module) else 0)
        shift = scales[i] ** config.objective.shift_power
        size = "×".join(map(str, shape[1:]))
        yield f"  {size:16}{shift:12.4g}{shares[i]:8.3g}{weights[i]:8.3g}{own:14,}{forward[i] / 1e9:15.1f}"
        unet = inner if isinstance(inner, nn.Module) else unet
    flops = training_flops(config, planned)
    step = flops * config.optimizer.batch_size
    yield f"  training takes {flops / 1e12:.4g} TFLOP a sample, {step / 1e15:.4g} PFLOP a step"


def _memory_line(memory: Memory, device: str, chunk: int) -> str:
    parts = dataclasses.asdict(memory)
    special = {"activations": f"activations of {chunk} samples", "adam": "Adam"}
    named = {special.get(name, name.replace("_", " ")): size for name, size in parts.items()}
    shown = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in named.items() if size)
    return f"  on {'a GPU' if device == 'cuda' else 'a CPU'} {memory.total / 1e9:.2f}: {shown}"


def _schedule(config: TrainConfig, model: nn.Module, world_size: int, chunk: int, rounds: int) -> Iterator[str]:
    optimizer, output = config.optimizer, config.output
    steps, weights = optimizer.steps, _parameters(model) * FLOAT32
    saved = weights * (3 + _averages(config))  # weights, Adam's two moments, averages
    yield f"schedule: {steps:,} steps of {optimizer.batch_size} samples, {steps * optimizer.batch_size:,} in all"
    yield f"  a step is {rounds} × {chunk} samples one after another on each of {world_size} processes"
    then = f"falls to 0 in the last {min(optimizer.cooldown, steps):,}" if optimizer.cooldown else "stays"
    yield f"  the learning rate rises for {min(optimizer.warmup, steps):,} steps to {optimizer.lr:.4g}, then {then}"
    kept = min(output.keep, math.ceil(steps / output.save_every))
    yield (
        f"  a checkpoint of {saved / 1e9:.2f} GB every {output.save_every:,} steps, of which {kept} are kept: "
        f"{kept * saved / 1e9:.1f} GB"
    )
    if optimizer.ema_stds:
        count = math.ceil(steps / optimizer.ema_snapshot_every)
        size = weights / FLOAT32 * FLOAT16 * _averages(config)
        yield f"  {count} snapshots of the averages, {size / 1e9:.2f} GB each: {count * size / 1e9:.1f} GB"
    for what, every in (("samples drawn", output.sample_every), ("evaluation", config.evaluation.evaluate_every)):
        if every:
            yield f"  {what} every {every:,} steps and at the end"
