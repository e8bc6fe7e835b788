"""Training steps in a process of their own: prints the bytes that a step takes at the most, beyond those of a step of
one sample, first with and then without recomputing activations, which takes more."""

import resource
from pathlib import Path

import torch

from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.data import Batch
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.distributed import Place
from mdm_models.training.learner import Learner
from tests.training.models import IMAGE_MODEL, settings

CPU = torch.device("cpu")


BATCH, SIZE = 16, 64


def configured(recompute: bool) -> TrainConfig:
    config = settings(Path("none.tar"), Path("none"))
    return changed(config, frames=1, size=SIZE, batch_size=BATCH, checkpoint_activations=recompute)


def make_step(recompute: bool, batch: int) -> None:
    config = configured(recompute)
    learner = Learner(config, IMAGE_MODEL, open_encoder(config.model, seed=0, device=CPU), Place(0, 1, CPU))
    learner.learn([Batch(torch.zeros(batch, 3, 1, SIZE, SIZE, dtype=torch.uint8), ["a cat"] * batch, [])])


def main() -> None:
    make_step(recompute=True, batch=1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for recompute in (True, False):
        make_step(recompute, BATCH)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


if __name__ == "__main__":
    main()
