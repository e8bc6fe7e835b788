"""What all ranks have in common as they measure."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from mdm_models.data.held_out import HeldOutBatch
from mdm_models.errors import DataError
from mdm_models.evaluation import measure as measuring
from mdm_models.processes import Processes
from tests import forked


def _batches(rank: int):
    """Three of one sample; rank 1 loses what reads its third."""
    for number in range(3):
        if (rank, number) == (1, 2):
            raise DataError("data: DataLoader worker (pid 7) is killed by signal: Killed")
        yield HeldOutBatch([number], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""], [""], [0])


def _measure(rank: int, folder: str) -> None:
    """Writes down how many batches it came to see, and why no more."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen = []
    measuring.level_losses = lambda *_: seen.append(rank) or torch.zeros(1, 1)
    held_out = SimpleNamespace(numbers=range(3), batches=lambda workers: _batches(rank))
    pipeline = SimpleNamespace(text_encoder=None, shapes=[(3, 8, 8)])
    comparison = SimpleNamespace(needs_samples=False, frechet=None)
    processes = Processes(rank, 2, torch.device("cpu"))
    try:
        measuring.measure(pipeline, held_out, comparison, processes, 1, measuring.Sampling(0, 1, "ddim"))
    except DataError as error:
        Path(folder, str(rank)).write_text(f"{len(seen)}: {error}")
    dist.destroy_process_group()


def test_what_one_rank_cannot_read_ends_the_evaluation_on_all(tmp_path):
    assert forked.run_together(_measure, (0, str(tmp_path)), (1, str(tmp_path))) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [
        "2: data: DataLoader worker (pid 7) is killed by signal: Killed"
    ] * 2
