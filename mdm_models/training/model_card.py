"""The model card of a run: what its directory tells, in Markdown, around what only its maker knows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mdm_models.config import UNetConfig
from mdm_models.pipeline import Pipeline
from mdm_models.training.monitor.logbook import EVALUATION, TRAINING, records_of

EVALUATION_FILE = "evaluation.json"
"""in a run directory: what `mdm evaluate RUN --json RUN/evaluation.json` wrote"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What no file of the run knows."""

    about: str
    """Markdown: what the model draws, its data with their licences, its limits"""
    command: str
    """that trained it"""
    machine: str
    """that it was trained on"""


def model_card(name: str, run: Path, pipeline: Pipeline, told: Told) -> str:
    """Raises OSError or ValueError if the run's files cannot be read."""
    config = json.loads((run / "config.json").read_text())
    records = records_of(run / "log.jsonl", "step", "kind")
    sections = [
        f"# {name}\n\n{told.about.strip()}",
        f"## Architecture\n\n{_architecture(pipeline)}",
        f"## Training\n\n{_training(config, records, told)}",
        f"## Evaluation\n\n{_evaluation(run, records)}",
    ]
    return "\n\n".join(sections) + "\n"


def _architecture(pipeline: Pipeline) -> str:
    shapes = pipeline.shapes
    lines = [
        f"* {' × '.join(map(str, shape[1:]))}: {_level(level)}"
        for level, shape in zip(pipeline.model.config.levels, shapes, strict=True)
    ]
    unet = sum(parameter.numel() for parameter in pipeline.model.parameters())
    text = sum(parameter.numel() for parameter in getattr(pipeline.text_encoder, "parameters", list)())
    plural = "s" * (len(shapes) > 1)
    return (
        f"A Matryoshka diffusion model of {len(shapes)} nested resolution{plural}, {unet:,} parameters, and "
        f"a text encoder of {text:,}; predicts {pipeline.config.prediction}.\n\n" + "\n".join(lines)
    )


def _level(level: UNetConfig) -> str:
    attention = f", attention {level.attention}" if any(level.attention) else ""
    frames = f", attention over frames {level.temporal_attention}" if any(level.temporal_attention) else ""
    return f"channels {level.channels}, blocks {level.blocks}{attention}{frames}"


def _training(config: dict[str, Any], records: list[dict[str, Any]], told: Told) -> str:
    training = [record for record in records if record["kind"] == TRAINING]
    last = training[-1]
    seconds, before = 0.0, 0
    for record in training:
        seconds += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    began = f", beginning from {config['model']['init_from']}" if config["model"]["init_from"] else ""
    settings = {**config["objective"], **config["optimizer"]}
    shown = ("prediction", "loss_target", "times", "shift_power", "batch_size", "lr", "warmup", "ema_decay")
    return (
        f"{last['step']:,} steps, {last['samples_seen']:,} samples ({last['epoch']:.1f} epochs), seed "
        f"{config['system']['seed']}, in {seconds / 3600:.1f} hours on {told.machine}{began}:\n\n"
        f"    {told.command}\n\n" + ", ".join(f"{name} {settings[name]}" for name in shown) + ". Weights are averaged, "
        "rounded to bfloat16; of the text encoder's embeddings only those of tokens in the captions are kept."
    )


def _evaluation(run: Path, records: list[dict[str, Any]]) -> str:
    found: dict[str, Any] = {}
    for record in records:
        if record["kind"] == EVALUATION:
            found = {f"{name}, in training": value for name, value in record.items() if name != "kind"}
    measured = run / EVALUATION_FILE
    if measured.is_file():
        found |= json.loads(measured.read_text())["results"]
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in found.items()]
    return "\n".join(["| on held-out samples | |", "|---|---|", *rows]) if rows else "Not evaluated."


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
