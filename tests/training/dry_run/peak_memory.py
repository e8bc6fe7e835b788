"""Training steps, for a process of their own."""

from pathlib import Path

import torch

from mdm_models.data.stream import Batch
from mdm_models.processes import Processes
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.learner import Learner
from tests.training.models import IMAGE_MODEL, settings

CPU = torch.device("cpu")


BATCH, SIZE = 16, 64


def configured(recompute: bool) -> TrainConfig:
    config = settings(Path("none.tar"), Path("none"))
    return changed(config, frames=1, size=SIZE, batch_size=BATCH, checkpoint_activations=recompute)


def make_step(recompute: bool, batch: int) -> None:
    config = configured(recompute)
    learner = Learner(config, IMAGE_MODEL, open_encoder(config.model, seed=0, device=CPU), Processes(0, 1, CPU))
    learner.learn([Batch(torch.zeros(batch, 3, 1, SIZE, SIZE, dtype=torch.uint8), ["a cat"] * batch, [])])


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the most. getrusage's peak is inherited from whoever started
    the process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[which].split()[0]) * 1024


def measure(found: Path) -> None:
    """Write down the bytes that a step takes at the most, beyond those of a step of one sample, first with and then
    without recomputing activations, which takes more."""
    torch.set_num_threads(1)
    make_step(recompute=True, batch=1)
    before = resident("VmRSS")
    with found.open("w") as lines:
        for recompute in (True, False):
            make_step(recompute, BATCH)
            print(resident("VmHWM") - before, file=lines)
