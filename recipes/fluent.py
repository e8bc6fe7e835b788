"""The paper's claim in small, on real images: three nested stages against a plain UNet of the same size.

    mdm prepare fluent-emoji --out data/fluent
    python recipes/fluent.py --data data/fluent/fluent-image-*.tar --out runs/fluent

trains, for every seed, a UNet at 8², then at 32² around it, then at 128² around both, each four times as large as the
one before as in the paper's largest model; and beside it a plain UNet at 128² of as many parameters, for as long. Both
are sampled as they learn, at 128², from captions held out of training; comparison.json and comparison.png tell how far
the samples are from the held-out images and how well both predict these, samples.png shows them. The same command again
goes on where it was stopped. Almost two hours of one CPU core a seed; --scale gpu is the same at 16², 64² and 256² with
wider networks. One of its runs alone, with options in place of its values as in other recipes:

    torchrun --nproc-per-node=2 recipes/fluent.py --preset 8 --data data/fluent/fluent-image-*.tar --out runs/a
    torchrun --nproc-per-node=2 recipes/fluent.py --preset 32 --data data/fluent/fluent-image-*.tar --out runs/b \
        --init-from runs/a
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from mdm_models.commands.line import exit_code, parse
from mdm_models.commands.train import Preset, run_recipe
from mdm_models.config import UNetConfig
from mdm_models.data.config import DataConfig
from mdm_models.recipes.fluent_report import Logged, Results, write_report
from mdm_models.training.config import (
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
    changed,
)
from mdm_models.training.trainer import train_whole
from mdm_models.unet import empty_model

TEXT_WIDTH = 64
PLAIN = "plain"
Scale = Literal["cpu", "gpu"]
Objective = Literal["paper", "x0"]
RATIO = 4  # of the sizes of two nested levels
EXTRACTOR = "efficientnet-lite0"  # comes with a package, so that it needs no network; its distances are not FID


@dataclass(frozen=True)
class Stage:
    """One training run: steps of `batch` samples at size², starting from the stage before."""

    name: str
    architecture: UNetConfig
    size: int
    batch: int
    steps: int
    evaluate_every: int = 0

    @property
    def model(self) -> str:
        """The name of its model in ARCHITECTURES."""
        return f"fluent_plain_{self.size}" if self.name == PLAIN else f"fluent_{self.size}"

    @property
    def sizes(self) -> list[int]:
        """Height and width of each level in pixels, highest resolution first."""
        return [shape[-1] for shape in self.architecture.sample_shapes(self.size)]


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
    scale: Annotated[Scale, tyro.conf.arg(help="8² to 128², or 16² to 256² and wider networks")] = "cpu"
    objective: Annotated[
        Objective,
        tyro.conf.arg(help="the paper's, v with the loss in ε; or that of recipes/emoji.py, x₀ with the loss in v"),
    ] = "paper"


def arms(scale: Scale) -> dict[str, list[Stage]]:
    """The stages of each arm. Outer levels are narrow, as the paper's are; the plain UNet has the same widths at the
    same resolutions, and 2 % more parameters."""
    width, size, batch, more = (1, 8, 8, 1) if scale == "cpu" else (4, 16, 64, 10)
    inner = _unet(width, (96, 128), (1, 1), text=True)
    middle = _unet(width, (32, 48, 96), (1, 1, 1), inner=inner)
    outer = _unet(width, (16, 16, 32), (1, 1, 1), inner=middle)
    nested = [  # larger batches where a sample costs less
        Stage("1", inner, size, 4 * batch, 1500 * more),
        Stage("2", middle, RATIO * size, 2 * batch, 900 * more),
        Stage("3", outer, RATIO**2 * size, batch, 1000 * more, evaluate_every=500 * more),
    ]
    plain = _unet(width, (16, 16, 32, 48, 96, 128), (1, 1, 1, 1, 1, 2), text=True)
    return {"nested": nested, "plain": [Stage(PLAIN, plain, RATIO**2 * size, batch, 2500 * more, 500 * more)]}


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
        norm_groups=8,
        context_dim=TEXT_WIDTH if text else 0,
        inner=inner,
        **(attending if text else {}),
    )


def objective_of(stage: Stage, objective: Objective, scale: Scale) -> ObjectiveConfig:
    """Choose a stage's objective, in which what counts as unshifted is a size, not a level, so that the highest level
    of both arms has the same noise."""
    smallest, middle, _ = (each.size for each in arms(scale)["nested"])
    if objective == "paper":  # noise and weights of its largest model, whose levels have these ratios too
        weights = tuple(size / smallest for size in stage.sizes)
        return ObjectiveConfig(shift_power=2.0, unshifted_size=middle, level_weights=weights)
    return ObjectiveConfig(
        shift_power=2.0,
        unshifted_size=16,
        prediction="x0",
        loss_target="v",
        times="logit_normal",
        times_mean=1.0 if stage.size == smallest else 0.5,
        times_deviation=1.5,
    )


def settings(
    scale: Scale, stage: Stage, shards: tuple[str, ...], out: str, objective: Objective = "paper"
) -> TrainConfig:
    return TrainConfig(
        out,
        DataConfig(shards, size=stage.size, holdout=0.1, workers=0 if scale == "cpu" else 8),
        ModelConfig(stage.model, text_width=TEXT_WIDTH),
        optimizer=OptimizerConfig(batch_size=stage.batch, steps=stage.steps, lr=1e-3, warmup=50, ema_decay=0.995),
        objective=objective_of(stage, objective, scale),
        evaluation=EvaluationConfig(
            evaluate_every=stage.evaluate_every, evaluate_samples=256, feature_extractor=EXTRACTOR
        ),
        output=OutputConfig(
            save_every=100, keep=1, sample_every=stage.steps, sample_count=8, sample_steps=25, guidance_scale=1.0
        ),
    )


def folder(comparison: Comparison, stage: Stage, seed: int) -> Path:
    return Path(comparison.out) / f"seed-{seed}" / f"stage-{stage.name}"


def run(comparison: Comparison) -> None:
    """Train the stages of the arms that are asked for, with each seed, and report. Raises TrainingError."""
    for seed in comparison.seeds:
        for arm, stages in arms(comparison.scale).items():
            before = ""
            for stage in stages if comparison.arms in ("both", arm) else []:
                out = str(folder(comparison, stage, seed))
                config = settings(comparison.scale, stage, comparison.data, out, comparison.objective)
                before = str(train_whole(changed(config, seed=seed, init_from=before), stage.architecture))
    report(comparison)


def report(comparison: Comparison) -> None:
    """Write what the logs that are there say."""
    results = [
        Results(arm, [Logged(s.name, s.sizes, _logs(comparison, s)) for s in stages], _parameters(stages[-1]))
        for arm, stages in arms(comparison.scale).items()
    ]
    write_report(results, Path(comparison.out))


def _logs(comparison: Comparison, stage: Stage) -> dict[int, Path]:
    """The log of a stage by seed, of those that are there."""
    logs = {seed: folder(comparison, stage, seed) / "log.jsonl" for seed in comparison.seeds}
    return {seed: path for seed, path in logs.items() if path.exists()}


def _parameters(stage: Stage) -> int:
    return sum(parameter.numel() for parameter in empty_model(stage.architecture).parameters())


def _preset(scale: Scale, stage: Stage) -> Preset:
    def preset(shards: tuple[str, ...], out: str) -> TrainConfig:
        return settings(scale, stage, shards, out)

    which = "the plain UNet" if stage.name == PLAIN else f"stage {stage.name}"
    preset.__doc__ = f"{' around '.join(f'{size}²' for size in stage.sizes)}, {which}, for a {scale.upper()}."
    return preset


SCALES: tuple[Scale, ...] = get_args(Scale)
STAGES: list[tuple[Scale, Stage]] = [
    (scale, stage) for scale in SCALES for stages in arms(scale).values() for stage in stages
]
PRESETS = {stage.model.removeprefix("fluent_"): _preset(scale, stage) for scale, stage in STAGES}
ARCHITECTURES = {stage.model: stage.architecture for _, stage in STAGES}


def main(arguments: list[str] | None = None) -> int:
    program, arguments = "recipes/fluent.py", sys.argv[1:] if arguments is None else arguments
    if any(argument.partition("=")[0] == "--preset" for argument in arguments):
        return run_recipe(PRESETS, __doc__, arguments, ARCHITECTURES)
    return exit_code(program, lambda: run(parse(program, __doc__, Comparison, arguments)))


if __name__ == "__main__":
    sys.exit(main())
