"""Where a step's time goes: a trace of a few steps, for chrome://tracing or Perfetto, and a table of the costliest."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from mdm_models.processes import Processes
from mdm_models.training.config import TrainConfig

SKIPPED, WARM_UP, TRACED = 4, 1, 3  # steps: the first ones compile and fill caches; recording costs time at first too
TABLE_ROWS = 40
TRACE, TABLE = "trace.json.gz", "table.txt"


class Idle:
    """Stands in a profiler's place where none is wanted."""

    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiling(config: TrainConfig, run: Path, processes: Processes) -> Iterator[profile | Idle]:
    """Inside the block, call `step` after each step: if the settings ask for it, the leading process writes steps 6 to
    8 of this block to RUN/profile. A block that ends before writes what it has of them, and says so if it has none."""
    if not (config.output.profile and processes.is_main):
        yield Idle()
        return
    folder = run / "profile"

    def write(recorded: profile) -> None:
        if recorded.step_num <= SKIPPED + WARM_UP:
            return
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / TRACE))
        column = f"self_{processes.device.type}_time_total"
        (folder / TABLE).write_text(recorded.key_averages().table(sort_by=column, row_limit=TABLE_ROWS) + "\n")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (processes.device.type == "cuda")
    steps = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write, record_shapes=True) as recorder:
        yield recorder
    if recorder.step_num <= SKIPPED + WARM_UP:
        print(f"{folder}: no trace, which begins after {SKIPPED + WARM_UP} steps; {recorder.step_num} were made")
