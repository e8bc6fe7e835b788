"""The model card of a run: what its directory tells, in Markdown, around what only its maker knows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mdm_models.config import UNetConfig
from mdm_models.pipeline import Pipeline
from mdm_models.training.checkpoint.checkpoints import list_steps
from mdm_models.training.monitor.logbook import EVALUATION, TRAINING, records_of

EVALUATION_FILE = "evaluation.json"
"""in a run directory: what `mdm evaluate RUN --json RUN/evaluation.json` wrote"""

SHOWN = (
    *("prediction", "loss_target", "times", "times_mean", "times_deviation", "shift_power"),
    *("batch_size", "lr", "warmup", "cooldown", "ema_decay"),
)
"""of the settings, in the card; a run of an earlier version may not know all"""

GRIDS = {
    "held_out.webp": "Real pictures that were held out, left, and uncurated samples for their captions, right",
    "trained.webp": "The same for pictures that were trained on",
}
"""in a run directory, as recipes/emoji_report.py draws them: file → what it shows"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a model card says that no file of the run knows."""

    about: str
    """Markdown: what the model draws, its data with their licences, its limits"""
    command: str
    """that trained it"""
    machine: str
    """that it was trained on"""


def model_card(name: str, run: Path, pipeline: Pipeline, told: Told) -> str:
    """Write the text of a run's model card, in Markdown. Raises OSError or ValueError if the run's files cannot be
    read."""
    config = json.loads((run / "config.json").read_text())
    sections = [
        f"# {name}\n\n{told.about.strip()}\n\n    mdm web {name}",
        f"## Architecture\n\n{_architecture(pipeline)}",
        f"## Training\n\n{_training(run, config, told)}",
        f"## Evaluation\n\n{_evaluation(run)}",
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


def _training(run: Path, config: dict[str, Any], told: Told) -> str:
    settings = {**config["objective"], **config["optimizer"]}
    shown = [name for name in SHOWN if name in settings]
    stage = Path(config["model"]["init_from"])
    before = f"It began as {stage.name}" + (f" had become in {_amount(stage)}." if _amount(stage) else ".")
    return (
        f"{_amount(run)} on {told.machine}, seed {config['system']['seed']}:\n\n    {told.command}\n\n"
        + (f"{before}\n\n" if stage.name else "")
        + ", ".join(f"{name} {settings[name]}" for name in shown)
        + ". The averaged weights, rounded to bfloat16; of the embeddings of tokens those that the captions use."
    )


def _amount(run: Path) -> str:
    """How much a run had learned at its newest checkpoint; "" if its log is not there."""
    if not (run / "log.jsonl").is_file():
        return ""
    until = max((int(path.name.removeprefix("step-")) for path in list_steps(run)), default=0)
    training = [record for record in _records(run) if record["kind"] == TRAINING and record["step"] <= until]
    seconds, before = 0.0, 0
    for record in training:
        seconds += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    if not training:
        return f"{until:,} steps"
    last = training[-1]
    samples = f"{last['samples_seen']:,} samples ({last['epoch']:.1f} epochs)"
    took = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    return f"{last['step']:,} steps, {samples}, in {took}"


def _records(run: Path) -> list[dict[str, Any]]:
    return records_of(run / "log.jsonl", "step", "kind")


def _evaluation(run: Path) -> str:
    found: dict[str, Any] = {}
    for record in _records(run):
        if record["kind"] == EVALUATION:
            found = {f"{name}, in training": value for name, value in record.items() if name != "kind"}
    measured = run / EVALUATION_FILE
    if measured.is_file():
        found |= json.loads(measured.read_text())["results"]
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in found.items()]
    table = ["| on held-out samples | |", "|---|---|", *rows] if rows else ["Not evaluated."]
    return "\n".join(
        table + [f"\n{text}\n\n![{text}]({name})" for name, text in GRIDS.items() if (run / name).is_file()]
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
