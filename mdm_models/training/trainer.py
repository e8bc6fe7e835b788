"""The training loop: shards in; a run directory with checkpoints, a log, sampled clips and the finished model out."""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

from mdm_models.config import UNetConfig
from mdm_models.training.config import TrainConfig, plan
from mdm_models.training.data import ClipReader, ClipStream, batches, split
from mdm_models.training.distributed import StopRequest, joined
from mdm_models.training.errors import TrainingError
from mdm_models.training.learner import Learner
from mdm_models.training.logbook import Interval, Logbook
from mdm_models.training.preview import Preview
from mdm_models.training.shards import ShardedSamples, expand, scan_all


def train(config: TrainConfig, architecture: UNetConfig | None = None) -> Path:
    """Train until `config.steps`, or until SIGINT or SIGTERM asks to stop; returns the run directory.

    architecture: a UNet other than the one that `config.model` names; its context_dim must be config.text_width.
    Raises TrainingError for what the user can mend.
    """
    planned = plan(config, architecture)
    run = Path(config.out)
    with joined(config.device) as place, StopRequest() as stop, contextlib.ExitStack() as files:
        samples = ShardedSamples(scan_all(expand(config.data)))
        training, validation = split(len(samples), config.holdout)
        reader = ClipReader(samples, config.frames, config.frame_rate, config.size)

        learner = Learner(config, planned.architecture, place)
        learner.resume(run)
        if place.leads:
            _write_config(run, config)
        stream = batches(
            ClipStream(reader, training, config.seed, config.caption_dropout),
            config.batch_size,
            samples_seen=learner.samples_seen,
            rank=place.rank,
            world=place.world,
            workers=config.workers,
            pin=place.device.type == "cuda",
        )
        log = preview = None  # the leading process alone writes files
        if place.leads and learner.step < config.steps:
            log = files.enter_context(contextlib.closing(Logbook(run, learner.step, config.steps)))
            log.skip(reader.damaged())
            if config.sample_every:
                preview = Preview.first_of(reader, itertools.chain(validation, training), config.sample_count)

        interval = Interval()
        stopping = False
        while learner.step < config.steps and not stopping:
            interval.begin()
            batch = next(stream)
            interval.received(batch)
            log_now = _due(learner.step + 1, config.log_every, config)
            outcome = learner.learn(batch, measure_levels=log_now)
            interval.learned(outcome.loss)
            if log:
                log.progress(interval, place.world)

            if log_now:
                skips = place.gather(interval.skips)
                if log:
                    log.skip(skips)
                    epoch = learner.samples_seen / len(training)
                    log.record(**learner.counters(), epoch=epoch, **interval.summary(place.world), **outcome.summary())
                interval = Interval()
            stopping = place.any(stop.asked)
            if log and (stopping or _due(learner.step, config.save_every, config)):
                learner.save(run)
            if preview and _due(learner.step, config.sample_every, config):
                preview.draw(learner, planned.shapes, run / "samples" / f"step-{learner.step:08d}.webp")

        if log:
            learner.export(run / "model")
        if place.leads:
            rest = "" if learner.step >= config.steps else "; the same command goes on from there"
            print(f"{run}: {learner.step} of {config.steps} steps{rest}")
    return run


def _due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    return step % every == 0 or step == config.steps


def _write_config(run: Path, config: TrainConfig) -> None:
    """Make the run directory and note in it what the run was told."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    except OSError as error:
        raise TrainingError(f"out: cannot write to {run}: {error.strerror}") from None
