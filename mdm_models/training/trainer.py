"""The training loop: shards in; a run directory with checkpoints, a log, samples and the finished model out."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdm_models.config import UNetConfig
from mdm_models.data.config import DataConfig
from mdm_models.data.fingerprint import Watch, record_of
from mdm_models.data.mixed import kinds_of, mixed_batches
from mdm_models.data.reader import SampleReader, prompt_check, prompts_for
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import SampleStream, split
from mdm_models.errors import TrainingError
from mdm_models.pipeline import PIPELINE_FILE
from mdm_models.processes import Processes, Sharing, StopRequest, init_process_group
from mdm_models.storage import url_of
from mdm_models.text import TextEncoder
from mdm_models.training.checkpoint.checkpoints import Checkpoints, is_finished, list_steps
from mdm_models.training.checkpoint.remote import Remote, mirrored
from mdm_models.training.config import TrainConfig, chunks_of, images_in, plan
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.ema.averages import PowerEMA
from mdm_models.training.ema.snapshots import forget_snapshots_after, write_snapshot
from mdm_models.training.evaluation import Evaluation
from mdm_models.training.fetched import fetched
from mdm_models.training.learner import Learner
from mdm_models.training.monitor.heartbeat import Heartbeat
from mdm_models.training.monitor.interval import Interval
from mdm_models.training.monitor.logbook import EVALUATION, Logbook, is_logged
from mdm_models.training.monitor.preview import Preview
from mdm_models.training.monitor.profiler import profiling
from mdm_models.training.monitor.run_lock import locked, locked_mirror
from mdm_models.training.monitor.throughput import Throughput
from mdm_models.training.monitor.watchdog import watched
from mdm_models.training.parallel import set_determinism
from mdm_models.training.settings import check_paths, compare_records, record_of_run, write_settings


def train_whole(config: TrainConfig, architecture: UNetConfig | None = None) -> Path:
    """Do as `train` does, as a part of something longer: raises KeyboardInterrupt if it was asked to stop before its
    last step."""
    run = train(config, architecture)
    if not is_finished(run, config.optimizer.steps):
        raise KeyboardInterrupt
    return run


def train(config: TrainConfig, architecture: UNetConfig | None = None) -> Path:
    """Train until `steps`, or until SIGINT, SIGTERM, SIGUSR1 or SIGXCPU asks to stop; returns the run directory.

    architecture: a UNet other than the one that the settings name; its context_dim must be the text encoder's width.
    Raises TrainingError for what the user can mend.
    """
    check_paths(config)
    told, config = config, mirrored(config)
    run, output, steps = Path(config.out), config.output, config.optimizer.steps
    set_determinism(config.system.deterministic)
    with (
        init_process_group(config.system.device) as processes,
        StopRequest() as stop,
        contextlib.ExitStack() as held,
        contextlib.ExitStack() as files,
    ):
        chunk_size, rounds = chunks_of(config.optimizer, processes.world_size)
        in_bf16 = config.system.uses_bf16(processes.device.type)
        encoder = open_encoder(config.model, config.system.seed, processes.device, in_bf16)
        planned = plan(config, architecture, encoder.width)
        images = images_in(config.data, chunk_size)
        readers = [_reader(data, encoder, processes) for data in kinds_of(config.data)]
        reader, counts = readers[0], [chunk_size - images, images][: len(readers)]
        shards = [shard for each in readers for shard in each.samples.shards]
        training, validation = split(reader.samples, config.data.holdout)
        evaluation = Evaluation.of(config, reader, validation, processes)

        held.enter_context(watched(processes, config.system.patience))
        remote, sharing = None, Sharing.of_all(processes)
        if url_of(told.out):
            run, sharing = held.enter_context(locked_mirror(run, processes))
            remote = Remote(told.out, run, output.keep, sharing)
            remote.begin(processes)
        else:
            held.enter_context(locked(run, processes))
        goes_on, *_ = processes.agree(lambda: bool(list_steps(run)))
        begins_from = "" if goes_on else config.model.init_from
        init_from = processes.agree(lambda: fetched(begins_from))[processes.rank]
        learner = Learner(config, planned.architecture, encoder, processes, init_from)
        records = processes.agree(lambda: list(map(record_of, shards)) if processes.is_main else [])[0]
        watch = Watch(shards, records, config.data.max_bad_share) if processes.is_main else None
        computed = {"arithmetic": "bf16" if in_bf16 else "float32", "samples at once in a process": chunk_size}
        record = record_of_run(config, encoder, records, computed)
        compare = partial(compare_records, accept=config.system.accept_changes)
        upload = remote.upload if remote else None
        checkpoints = Checkpoints(run, learner.identity(), output.keep, processes, record, compare, upload, sharing)
        learner.resume(checkpoints)
        if processes.is_main:
            write_settings(run, told)
            forget_snapshots_after(run, learner.step)
        stream = mixed_batches(
            [(_stream(config, each), count) for each, count in zip(readers, counts, strict=True)],
            first_chunk=learner.samples_seen // chunk_size,
            rank=processes.rank,
            world_size=processes.world_size,
            workers=config.data.workers,
            pin=processes.device.type == "cuda",
        )
        throughput = Throughput.of(config, planned, processes)
        profiler = files.enter_context(profiling(config, run, processes))
        owed = evaluation and processes.any(processes.is_main and _owes_evaluation(config, learner.step))
        log = preview = heartbeat = None
        if learner.step < steps or owed:
            preview = Preview.of(output, reader, itertools.chain(validation, training), processes)
            if processes.is_main:  # which alone writes to the log
                log = files.enter_context(contextlib.closing(Logbook(config, learner.step)))
                log.skip([skip for each in readers for skip in each.damaged()])
                log.say(str(throughput))
                heartbeat = Heartbeat(config)

        def evaluate() -> None:
            numbers = evaluation.measure(learner) if evaluation else {}
            if log:
                log.record(learner.step, EVALUATION, **numbers)

        if owed:
            evaluate()
        if learner.step < steps:
            first = []
            processes.agree(lambda: first.extend(itertools.islice(stream, rounds)))
            stream = itertools.chain(first, stream)
            expected = learner.rehearse(first) * (steps - learner.step)
            if log:
                log.say(f"{steps - learner.step} steps to go: about {tqdm.format_interval(expected)}, drawing apart")
        interval = Interval(throughput)
        begun_at, stopping, failure = learner.step, False, None
        while learner.step < steps and not stopping:
            interval.begin()
            try:
                chunks = list(itertools.islice(stream, rounds))
            except TrainingError as error:
                failure = error
            if processes.any(failure is not None):
                break
            interval.received(chunks)
            log_now = _due(learner.step + 1, output.log_every, steps)
            outcome = learner.learn(chunks, stop=lambda: stop.asked or checkpoints.failed)
            interval.learned(outcome.loss)
            profiler.step()
            if log and heartbeat:
                log.progress(interval)
                numbers = interval.summary()
                heartbeat.beat(learner.step, numbers["loss"], numbers["samples_per_second"])

            if log_now:
                skips = processes.gather(interval.skips)
                if log:
                    log.skip(skips)
                    epoch = learner.samples_seen * counts[0] / chunk_size / len(training)
                    measured: dict[str, Any] = interval.summary() | outcome.summary()
                    log.record(**learner.counters(), epoch=epoch, **measured)
                interval = Interval(throughput)
            if isinstance(learner.ema, PowerEMA) and _due(learner.step, config.optimizer.ema_snapshot_every, steps):
                write_snapshot(run, learner.step, learner.ema, processes)
            stopping = outcome.stop
            if stopping or _due(learner.step, output.save_every, steps):
                learner.save(checkpoints)
                failure = _caught(watch.check) if watch else None
                if processes.any(failure is not None):
                    break
            if preview and not stopping and _due(learner.step, output.sample_every, steps):
                preview.save(learner, run / "samples" / f"step-{learner.step:08d}.webp")
            if evaluation and not stopping and _due(learner.step, config.evaluation.evaluate_every, steps):
                failure = _caught(evaluate)
                if processes.any(failure is not None):
                    break

        failed = processes.any(failure is not None)
        if failed and learner.step > begun_at:
            learner.save(checkpoints)
        checkpoints.finish()
        if learner.step > begun_at or processes.any(processes.is_main and not (run / "model" / PIPELINE_FILE).exists()):
            learner.export(run / "model")
        files.close()  # the progress bar among them, which would be drawn over what is printed
        if heartbeat and not failed:
            heartbeat.end(learner.step)
        if remote:
            failure = _caught(lambda: remote.finish(processes)) or failure
        processes.any(False)  # all leave together: who started them may end the others when the first has gone
        held.close()
        processes.agree(lambda: _raise(failure))
        if processes.is_main:
            rest = "" if learner.step >= steps else "; the same command goes on from there"
            print(f"{told.out}: {learner.step} of {steps} steps{rest}")
    return run


def _reader(data: DataConfig, encoder: TextEncoder, processes: Processes) -> SampleReader:
    samples = ShardedSamples(open_shards(data, processes))
    return SampleReader(samples, data, prompts_for(encoder), prompt_check(encoder))


def _stream(config: TrainConfig, reader: SampleReader) -> SampleStream:
    training, _ = split(reader.samples, config.data.holdout)
    return SampleStream(reader, training, config.system.seed, config.model.caption_dropout)


def _caught(work: Callable[[], object]) -> TrainingError | None:
    try:
        work()
    except TrainingError as error:
        return error


def _raise(failure: TrainingError | None) -> None:
    if failure is not None:
        raise failure


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    return step % every == 0 or step == steps


def _owes_evaluation(config: TrainConfig, step: int) -> bool:
    """Whether the run was to be evaluated after this step, and ended between the checkpoint and that."""
    due = step > 0 and _due(step, config.evaluation.evaluate_every, config.optimizer.steps)
    return due and not is_logged(Path(config.out), step, EVALUATION)
