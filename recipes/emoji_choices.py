"""What the settings of recipes/emoji.py were chosen by: short trainings that differ in one thing each.

    python recipes/emoji_choices.py --data EMOJI --out runs/choices --minutes 8 --at-once 2

trains each choice from scratch for the same CPU time, of one thread, its start and the reading of pictures included,
and prints a table: the samples that it saw; the mean squared error of the innermost level's image, predicted from its
noisy one at two times with the right caption; and, of samples for held-out captions, the share whose real picture is
among the nearest five and the Fréchet distance, both as recipes/emoji_report.py has them, at 64². The same command
again goes on.
"""

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mdm_models.commands.line import exit_code, parse
from mdm_models.data.config import check_above_0
from mdm_models.errors import COME_AGAIN, TrainingError
from mdm_models.recipes import emoji_captions, emoji_report
from mdm_models.storage import write_whole
from mdm_models.training.monitor.logbook import records_of
from mdm_models.training.saved import open_pipeline
from mdm_models.training.settings import read_settings

SHORT = "--batch-size 16 --warmup 50 --ema-decay 0.99 --save-every 1000000 --sample-every 0 --evaluate-every 0"
TIMES = 500, 900  # of 1000, at which errors are measured
HEADER = (
    f"| | samples seen | error at {TIMES[0]} | error at {TIMES[1]} | right among five | Fréchet distance |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Choice:
    """Options of recipes/emoji.py, a string for each stage; the stages share the time evenly."""

    title: str
    stages: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.title.replace(" ", "-").replace("/", "-")


CHOICES = (
    Choice("present settings", ("--preset 16",)),
    Choice("times of mean 0 and deviation 1", ("--preset 16 --times-mean 0 --times-deviation 1",)),
    Choice("paper: v, loss in eps, uniform times", ("--preset 16 --prediction v --loss-target eps --times discrete",)),
    Choice("a third of the learning rate", ("--preset 16 --lr 2e-4",)),
    Choice("twice the learning rate", ("--preset 16 --lr 1.2e-3",)),
    Choice("an average of half the width", ("--preset 16 --ema-decay 0.98",)),
    Choice("an average of twice the width", ("--preset 16 --ema-decay 0.995",)),
    Choice("a frozen text encoder", ("--preset 16 --text-encoder {frozen_text_encoder}",)),
    Choice("64² at once, half of it at the top", ("--preset 64",)),
    Choice("64² at once, all of it at the top", ("--preset 64 --level-shares 1 1",)),
    Choice("16², then 64²", ("--preset 16", "--preset 64")),
)


@dataclass(frozen=True)
class Options:
    data: tuple[str, ...]
    """shards of `mdm prepare emoji`"""
    out: Path
    """folder for the runs, choices.json and choices.md"""
    minutes: float = 8.0
    """of CPU time for each choice"""
    at_once: int = 1
    """choices trained beside each other, one thread each"""
    captions: int = 100
    """held-out ones that samples are drawn for"""
    steps: int = 10
    """of a sample"""
    frozen_text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """of the choice that does not train its own: a directory or hub id"""

    def __post_init__(self):
        check_above_0(self, "minutes", "at_once", "captions", "steps")


def report(options: Options) -> None:
    """Train each of the CHOICES, measure it, and write the table. Raises TrainingError, OSError or ValueError in one
    line."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, float]] = {}
    lines = list(HEADER)
    print(*lines, sep="\n", flush=True)
    with ThreadPoolExecutor(options.at_once) as pool, Trainings() as trainings:
        try:
            found = pool.map(lambda choice: _kept(choice, trainings, options), CHOICES)
            for choice, numbers in zip(CHOICES, found, strict=True):
                measured[choice.title] = numbers
                lines.append(row(choice.title, numbers))
                print(lines[-1], flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_whole(options.out / "choices.json", lambda path: path.write_text(json.dumps(measured, indent=1) + "\n"))
    write_whole(options.out / "choices.md", lambda path: path.write_text("\n".join(lines) + "\n"))


def row(title: str, numbers: dict[str, float]) -> str:
    """Write a line of the table, in Markdown."""
    cells = [title, f"{numbers['samples_seen']:,.0f}", *(f"{numbers[f'error_{time}']:.4f}" for time in TIMES)]
    cells += [f"{numbers['right_of_5']:.2f}", f"{numbers['frechet_efficientnet_lite0']:.0f}"]
    return f"| {' | '.join(cells)} |"


class Trainings:
    """Processes that train, each for its time; the `with` block ends those that are still at work."""

    def __enter__(self) -> "Trainings":
        self._running: set[subprocess.Popen[bytes]] = set()
        return self

    def __exit__(self, *error) -> None:
        for process in list(self._running):
            process.kill()

    def train(self, arguments: list[str], seconds: float, run: Path) -> None:
        """Run `mdm train emoji` until `seconds` of CPU time have passed. Raises TrainingError if it ended otherwise."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (round(seconds), resource.RLIM_INFINITY))

        process = subprocess.Popen(
            [sys.executable, "-m", "mdm_models.cli", "train", "emoji", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=limit,
            start_new_session=True,  # Ctrl-C must not look like the end of its time
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._running.add(process)
        _, said = process.communicate()
        self._running.discard(process)
        if process.returncode != COME_AGAIN:
            told = said.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise TrainingError(f"training into {run} ended with code {process.returncode} and said: {told[-1]}")


def _kept(choice: Choice, trainings: Trainings, options: Options) -> dict[str, float]:
    """What was measured of it, now or before."""
    file = options.out / choice.folder / "measured.json"
    if not file.exists():
        result = json.dumps(measure(trained(choice, trainings, options), options), indent=1)
        write_whole(file, lambda path: path.write_text(result))
    return json.loads(file.read_text())


def trained(choice: Choice, trainings: Trainings, options: Options) -> Path:
    """Train a choice for its time; → the run of its last stage."""
    runs: list[Path] = []
    for stage in choice.stages:
        run = options.out / choice.folder / f"stage-{len(runs) + 1}"
        start = ["--init-from", str(runs[-1])] if runs else []
        if not (run / "model").exists():
            settings = [word.format(frozen_text_encoder=options.frozen_text_encoder) for word in stage.split()]
            arguments = [*SHORT.split(), *settings, "--data", *options.data, "--out", str(run), *start]
            trainings.train(arguments, options.minutes * 60 / len(choice.stages), run)
        runs.append(run)
    return runs[-1]


def measure(run: Path, options: Options) -> dict[str, float]:
    """Measure a run: samples seen, errors of its predictions at TIMES, and how its samples compare with real
    drawings."""
    pipeline, settings = open_pipeline(run), read_settings(run)
    assert settings, "a run has settings"
    how = emoji_report.Options(
        run,
        options.data,
        options.out,
        holdout=settings.data.holdout,
        steps=options.steps,
        captions=options.captions,
        quiet=True,
    )
    images, captions = emoji_captions.held_out(options.data, settings.data.size, settings.data.holdout, 128)
    errors = {f"error_{time}": emoji_captions.error(pipeline, images, captions, time, 0) for time in TIMES}
    chosen = emoji_report.choose(*emoji_report.drawings(how), how)
    real = emoji_report.stacked(chosen.held_out)
    sampled = emoji_report.drawn_for(chosen.held_out, pipeline, how)
    seen = records_of(run / "log.jsonl", "step", "kind")[-1]["samples_seen"]
    of_samples = emoji_report.shares(sampled, real, "") | emoji_report.distance(sampled, real, pipeline.device)
    return {"samples_seen": seen, **errors, **of_samples}


def main(arguments: list[str] | None = None) -> int:
    program, arguments = "emoji_choices.py", sys.argv[1:] if arguments is None else arguments
    return exit_code(program, lambda: report(parse(program, __doc__, Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
