"""The paper's claim in small, on real images: three nested stages against a plain UNet of the same size.

    mdm prepare fluent-emoji --out data/fluent
    python recipes/fluent.py --data data/fluent/fluent-image-*.tar --out runs/fluent

trains, for every seed, a UNet at 8², then at 16² around it, then at 32² around both; and beside it a plain UNet at 32²
of as many parameters, for more steps at 32². Both are sampled as they learn, at 32², from captions held out of
training; comparison.json and comparison.png tell how far the samples are from the held-out images, and how well both
predict these. The same command again goes on where it was stopped. About half an hour of one CPU core a seed; --scale
gpu is the same at 64², 128² and 256² with wider networks.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mdm_models.config import UNetConfig
from mdm_models.training.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OutputConfig,
    SystemConfig,
    TrainConfig,
)
from mdm_models.training.errors import TrainingError
from mdm_models.training.trainer import train

TEXT_WIDTH = 64
EXTRACTOR = "efficientnet-lite0"  # comes with a package, so that it needs no network; its distances are not FID
DISTANCE = "frechet_efficientnet_lite0"
LOSS = "validation_loss_0"  # of the highest level


@dataclass(frozen=True)
class Stage:
    """One training run: steps of `batch` samples at size², starting from the stage before."""

    name: str
    architecture: UNetConfig
    size: int
    batch: int
    steps: int
    evaluate_every: int = 0


@dataclass(frozen=True)
class Comparison:
    """Train the arms of the comparison and draw what came of them."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(help="WebDataset shards of captioned images")]
    out: Annotated[str, tyro.conf.arg(help="folder of all runs and of the result")]
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="one training of each arm for each")] = (0, 1, 2)
    arms: Annotated[
        Literal["both", "nested", "plain"],
        tyro.conf.arg(help="what to train: two processes can share the work; the result shows all that is there"),
    ] = "both"
    scale: Annotated[Literal["cpu", "gpu"], tyro.conf.arg(help="8² to 32², or 64² to 256² and wider networks")] = "cpu"


def nested_stages(scale: str) -> list[Stage]:
    """The three stages; outer levels are narrow, as the paper's are."""
    width, size, batch = (1, 8, 16) if scale == "cpu" else (4, 64, 64)
    inner = _unet(width, (64, 96), (1, 1), text=True)
    middle = _unet(width, (32, 64), (1, 1), inner=inner)
    outer = _unet(width, (16, 32), (1, 1), inner=middle)
    more = 1 if scale == "cpu" else 10
    return [  # larger batches where a sample costs less
        Stage("1", inner, size, 4 * batch, 300 * more),
        Stage("2", middle, 2 * size, 2 * batch, 300 * more),
        Stage("3", outer, 4 * size, batch, 900 * more, evaluate_every=300 * more),
    ]


def plain_stage(scale: str) -> Stage:
    """A UNet with the same widths at the same resolutions, and 2 % more parameters than the nested one."""
    width, size, batch = (1, 32, 16) if scale == "cpu" else (4, 256, 64)
    more = 1 if scale == "cpu" else 10
    return Stage(
        "plain", _unet(width, (16, 32, 64, 96), (1, 1, 1, 2), text=True), size, batch, 1500 * more, 300 * more
    )


def _unet(
    width: int, channels: tuple[int, ...], blocks: tuple[int, ...], inner: UNetConfig | None = None, text: bool = False
) -> UNetConfig:
    """The innermost UNet (`text`) reads captions and attends at its lowest resolution."""
    attending = {"attention": (*[0] * (len(channels) - 1), 1), "attention_ffn": True, "mid_blocks": True}
    return UNetConfig(
        channels=tuple(width * c for c in channels),
        blocks=blocks,
        num_heads=4,
        embed_dim=192 * width,
        norm_groups=16,
        context_dim=TEXT_WIDTH if text else 0,
        inner=inner,
        **(attending if text else {}),
    )


def settings(comparison: Comparison, stage: Stage, seed: int, before: Path | None) -> TrainConfig:
    return TrainConfig(
        out=str(folder(comparison, stage, seed)),
        data=DataConfig(comparison.data, size=stage.size, holdout=0.1, workers=0 if comparison.scale == "cpu" else 8),
        model=ModelConfig(stage.name, text_width=TEXT_WIDTH, init_from=str(before) if before else ""),
        optimizer=OptimizerConfig(batch_size=stage.batch, steps=stage.steps, lr=1e-3, warmup=50, ema_decay=0.995),
        objective=ObjectiveConfig(unshifted_size=plain_stage(comparison.scale).size),  # both arms see the same noise
        system=SystemConfig(seed=seed),
        evaluation=EvaluationConfig(
            evaluate_every=stage.evaluate_every, evaluate_samples=256, feature_extractor=EXTRACTOR
        ),
        output=OutputConfig(
            save_every=100, keep=1, sample_every=stage.steps, sample_count=8, sample_steps=12, guidance_scale=1.0
        ),
    )


def folder(comparison: Comparison, stage: Stage, seed: int) -> Path:
    return Path(comparison.out) / f"seed-{seed}" / f"stage-{stage.name}"


def run(comparison: Comparison) -> None:
    for seed in comparison.seeds:
        if comparison.arms != "plain":
            before = None
            for stage in nested_stages(comparison.scale):
                before = train(settings(comparison, stage, seed, before), stage.architecture)
        if comparison.arms != "nested":
            stage = plain_stage(comparison.scale)
            train(settings(comparison, stage, seed, None), stage.architecture)
    result = collect(comparison)
    path = Path(comparison.out) / "comparison.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')} have the result")


def collect(comparison: Comparison) -> dict:
    """What the logs say: for each arm, seconds of training before its top resolution, seconds a step there, and by seed
    the distances at its evaluations.

    Seconds are steps times the median time of a step in all logs of the stage, so that what else the machine did at a
    time does not count.
    """
    stages, plain = nested_stages(comparison.scale), plain_stage(comparison.scale)
    tops = {"nested": stages[-1], "plain": plain}
    seconds = {stage.name: _step_seconds(comparison, stage) for stage in [*stages, plain]}
    before = sum(stage.steps * seconds[stage.name] for stage in stages[:-1] if seconds[stage.name])
    return {
        "distance": DISTANCE,
        "size": plain.size,
        "parameters": {name: _parameters(stage.architecture) for name, stage in tops.items()},
        "nested": {"seconds_before": before} | _curves(comparison, stages[-1], seconds),
        "plain": {"seconds_before": 0.0} | _curves(comparison, plain, seconds),
        "stages": [
            {"name": s.name, "size": s.size, "batch": s.batch, "steps": s.steps, "step_seconds": seconds[s.name]}
            for s in [*stages, plain]
        ],
    }


def _parameters(architecture: UNetConfig) -> int:
    from mdm_models.unet import empty_model

    return sum(parameter.numel() for parameter in empty_model(architecture).parameters())


def _curves(comparison: Comparison, stage: Stage, seconds: dict[str, float]) -> dict:
    curves = {}
    for seed in comparison.seeds:
        evaluations = [r for r in _log(comparison, stage, seed) if r["kind"] == "evaluation"]
        curves[str(seed)] = [{name: r[name] for name in ("step", DISTANCE, LOSS)} for r in evaluations]
    return {"step_seconds": seconds[stage.name], "batch": stage.batch, "seeds": curves}


def _step_seconds(comparison: Comparison, stage: Stage) -> float:
    """Median over the log records of all seeds; 0 if there are none."""
    records = [r for seed in comparison.seeds for r in _log(comparison, stage, seed) if r["kind"] == "training"]
    return statistics.median(r["step_seconds"] for r in records) if records else 0.0


def _log(comparison: Comparison, stage: Stage, seed: int) -> list[dict]:
    path = folder(comparison, stage, seed) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(result: dict, path: Path) -> None:
    """Distance and loss against steps at the top resolution, and against training time; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for arm, label, colour in (("nested", "three nested stages", "tab:blue"), ("plain", "plain UNet", "tab:orange")):
        curves = result[arm]
        for number, points in enumerate(curves["seeds"].values()):
            steps = [point["step"] for point in points]
            minutes = [(curves["seconds_before"] + step * curves["step_seconds"]) / 60 for step in steps]
            style = {"color": colour, "marker": "o", "markersize": 3, "label": None if number else label}
            for row, quantity in zip(panels, (DISTANCE, LOSS), strict=True):
                values = [point[quantity] for point in points]
                row[0].plot(steps, values, **style)
                row[1].plot(minutes, values, **style)
    size = result["size"]
    panels[0, 0].set_ylabel("Fréchet distance, EfficientNet-lite0 (not FID)")
    panels[1, 0].set_ylabel(f"validation loss at {size}²")
    panels[1, 0].set_xlabel(f"steps at {size}²")
    panels[1, 1].set_xlabel("training time of all stages (minutes)")
    panels[0, 0].legend()
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.suptitle(f"Fluent Emoji at {size}²: samples against held-out images, a line a seed")
    figure.savefig(path, dpi=120)


def main() -> int:
    try:
        run(tyro.cli(Comparison, description=__doc__))
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
