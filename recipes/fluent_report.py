"""What the logs of `fluent.py` say, as numbers and pictures."""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from mdm_models.training.monitor.logbook import records_of

DISTANCE = "frechet_efficientnet_lite0"
LOSS = "validation_loss_0"  # of the highest level
COLOURS = {"nested": "tab:blue", "plain": "tab:orange"}
LABELS = {"nested": "three nested stages", "plain": "plain UNet"}


@dataclass
class Logged:
    """The logs of one stage, by seed; sizes: height and width of each level in pixels, highest resolution first."""

    name: str
    sizes: list[int]
    logs: dict[int, Path]

    @cached_property
    def records(self) -> dict[int, list[dict]]:
        return {seed: records_of(path, "step", "kind") for seed, path in self.logs.items()}

    def of(self, kind: str) -> dict[int, list[dict]]:
        """The records of one kind, by seed."""
        return {seed: [r for r in records if r["kind"] == kind] for seed, records in self.records.items()}

    @property
    def steps(self) -> int:
        """The last step that any seed's log has; 0 without records."""
        return max((record["step"] for records in self.records.values() for record in records), default=0)

    @property
    def grids(self) -> list[Path]:
        """The samples drawn last for each seed; a run that is still at work may have none."""
        drawn = [sorted((log.parent / "samples").glob("step-*.webp")) for log in self.logs.values()]
        return [paths[-1] for paths in drawn if paths]

    @property
    def step_seconds(self) -> float:
        """The median seconds a step over all records of all seeds, so that what else the machine did at a time does not
        count."""
        times = [record["step_seconds"] for records in self.of("training").values() for record in records]
        return statistics.median(times) if times else 0.0


@dataclass
class Results:
    """One arm of the comparison; its last stage is at the highest resolution."""

    arm: str
    stages: list[Logged]
    parameters: int

    @property
    def seconds_before(self) -> float:
        """The seconds of training in the stages before the last one."""
        return sum(stage.steps * stage.step_seconds for stage in self.stages[:-1])

    def seconds_at(self, step: int) -> float:
        """Give the seconds of training in all stages until this step of the last one; evaluations do not count."""
        return self.seconds_before + step * self.stages[-1].step_seconds

    def summary(self) -> dict:
        """Give what comparison.json says of this arm: parameters, stages, and the evaluations of the last stage by
        seed."""
        last = self.stages[-1]
        evaluations = {
            str(seed): [
                {name: record[name] for name in ("step", DISTANCE, LOSS)}
                | {"seconds": round(self.seconds_at(record["step"]), 1)}
                for record in records
            ]
            for seed, records in last.of("evaluation").items()
        }
        stages = [
            {"name": stage.name, "size": stage.sizes[0], "steps": stage.steps}
            | {"step_seconds": round(stage.step_seconds, 4)}
            for stage in self.stages
        ]
        return {"parameters": self.parameters, "stages": stages, "evaluations": evaluations}


def write_report(results: list[Results], out: Path) -> None:
    """Write comparison.json and .png, stages.png and samples.png, in `out`."""
    (out / "comparison.json").write_text(json.dumps({r.arm: r.summary() for r in results}, indent=1) + "\n")
    plot_comparison(results, out / "comparison.png")
    plot_stages(results, out / "stages.png")
    plot_samples(results, out / "samples.png")
    print(f"{out} has the result: comparison.json, comparison.png, stages.png, samples.png")


def plot_comparison(results: list[Results], path: Path) -> None:
    """Plot distance and loss against steps at the top resolution, and against training time; a line a seed."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for result in results:
        for number, records in enumerate(result.stages[-1].of("evaluation").values()):
            steps = [record["step"] for record in records]
            minutes = [result.seconds_at(step) / 60 for step in steps]
            label = None if number else LABELS[result.arm]
            style = {"color": COLOURS[result.arm], "marker": "o", "markersize": 3, "label": label}
            for row, quantity in zip(panels, (DISTANCE, LOSS), strict=True):
                values = [record[quantity] for record in records]
                row[0].plot(steps, values, **style)
                row[1].plot(minutes, values, **style)
    size = results[0].stages[-1].sizes[0]
    panels[0, 0].set_ylabel("Fréchet distance, EfficientNet-lite0 (not FID)")
    panels[1, 0].set_ylabel(f"validation loss at {size}²")
    panels[1, 0].set_xlabel(f"steps at {size}²")
    panels[1, 1].set_xlabel("training time of all stages (minutes)")
    panels[0, 0].legend()
    figure.suptitle(f"Fluent Emoji at {size}²: samples against held-out images, a line a seed")
    _save(figure, panels.flat, path)


def plot_stages(results: list[Results], path: Path) -> None:
    """Plot the training loss of every level in every stage, one stage after another; the first seed of each arm."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(results), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, result in zip(panels, results, strict=True):
        begun = 0
        for stage in result.stages:
            for records in list(stage.of("training").values())[:1]:
                steps = [begun + record["step"] for record in records]
                levels = zip(*(record["level_losses"] for record in records), strict=True)
                for size, losses in zip(stage.sizes, levels, strict=True):
                    axes.plot(steps, losses, color=f"C{size.bit_length()}", linewidth=0.8, label=f"{size}²")
            begun += stage.steps
            axes.axvline(begun, color="grey", linewidth=0.5)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys())
        axes.set(xlabel="steps of all stages", yscale="log", title=LABELS[result.arm])
    panels[0].set_ylabel("training loss of each level")
    _save(figure, panels, path)


def plot_samples(results: list[Results], path: Path) -> None:
    """Show the last grid of each arm, of its first seed: the same captions, with the real images above."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(len(results), 1, figsize=(11, 3 * len(results)), layout="constrained")
    for axes, result in zip(panels, results, strict=True):
        last = result.stages[-1]
        axes.set(title=f"{LABELS[result.arm]}, {result.seconds_at(last.steps) / 60:.0f} minutes", xticks=[], yticks=[])
        axes.axis("off")
        for newest in last.grids[:1]:
            with Image.open(newest) as grid:
                axes.imshow(grid)
    figure.savefig(path, dpi=100)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, panels, path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
