"""What the processes that test_faults.py starts do: save checkpoints, go on from them, and train."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mdm_models.errors import CheckpointError
from mdm_models.processes import Processes
from mdm_models.training import trainer
from mdm_models.training.checkpoint.checkpoints import Checkpoints
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.monitor.watchdog import watched
from tests.training.models import LEAST_MODEL, settings

IDENTITY = {"name": "small"}


def flat_state(step: int, elements: int = 1000) -> dict:
    """A state whose every number is the step: torn ones show."""
    values = {f"w{i}": torch.full((elements,), float(step)) for i in range(3)}
    return {"model": values, "optimizer": {}, "ema": values, "counters": {"step": step}}


def is_of_one_step(state: dict) -> bool:
    step = state["counters"]["step"]
    return all((tensor == step).all() for part in ("model", "ema") for tensor in state[part].values())


def alone(run: Path, keep: int) -> Checkpoints:
    return Checkpoints(run, IDENTITY, keep, Processes(0, 1, torch.device("cpu")))


def save_and_die_at(run: Path, step: int, moment: int) -> None:
    """Save one step, keeping no other, and be killed before the `moment`-th change of the file system."""
    left = moment

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        changes = event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
        changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = alone(run, keep=1)
    sys.addaudithook(count)
    checkpoints.save(step, flat_state(step))
    checkpoints.finish()


def save_until_killed(run: Path, elements: int, told) -> None:
    """Continue a run and save each step, telling of those that are on the disk."""
    checkpoints, state = alone(run, keep=2), flat_state(0, elements)
    checkpoints.load_newest(state)
    step = state["counters"]["step"]
    while True:
        step += 1
        checkpoints.save(step, flat_state(step, elements))
        checkpoints.finish()
        told.send(step)


def trained(seed: int, sharded: bool) -> dict:
    """The state of a model after one step, a function of the seed; sharded over the processes, or the same on all."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 7))
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 * seed)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * seed)
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "ema": {name: parameter.detach() + 1 for name, parameter in model.named_parameters()},
        "counters": {"step": seed},
    }


def whole_tensors(value):
    """A state with plain tensors in place of DTensors."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: whole_tensors(entry) for key, entry in value.items()}
    return [whole_tensors(entry) for entry in value] if isinstance(value, list) else value


def join(rank: int, world_size: int, meeting: Path) -> Processes:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    return Processes(rank, world_size, torch.device("cpu"))


def save_together(rank: int, world_size: int, folder: Path) -> None:
    """One process of many that save steps 1 and 2 of two runs; the last of them then runs out of disk in step 3."""
    processes = join(rank, world_size, folder / "saving")
    for kind in ("sharded", "replicated"):
        checkpoints = Checkpoints(folder / kind, IDENTITY, 2, processes)
        for step in (1, 2):
            checkpoints.save(step, trained(step, kind == "sharded"))
        checkpoints.finish()
    if rank == world_size - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    checkpoints.save(3, trained(3, False))
    try:
        checkpoints.finish()
    except CheckpointError as error:
        failure = str(error)
    dist.barrier()
    if rank != world_size - 1:  # which cannot write this down
        (folder / f"failure-{rank}").write_text(failure)


def load_together(rank: int, world_size: int, folder: Path) -> None:
    """One process of many that continues both runs, as a sharded and as a replicated model, and writes down what it
    has then."""
    processes = join(rank, world_size, folder / "loading")
    for kind in ("sharded", "replicated"):
        checkpoints = Checkpoints(folder / kind, IDENTITY, 2, processes)
        for sharded in (True, False):
            state = trained(9, sharded)
            checkpoints.load_newest(state)
            torch.save(whole_tensors(state), folder / f"{kind}-{sharded}-{rank}.pt")
    dist.barrier()


def often_saving(shard: Path, out: Path) -> TrainConfig:
    """Twelve steps on pictures, with a checkpoint after every second one."""
    often = {"save_every": 2, "log_every": 1}
    return changed(settings(shard, out), frames=1, steps=12, micro_batch=1, deterministic=True, **often)


def train(config: TrainConfig, environment: dict[str, str]) -> None:
    """A training run, as torchrun starts it with such an environment."""
    os.environ |= environment
    torch.set_num_threads(1)
    trainer.train(config, LEAST_MODEL)


def watch(rank: int, world_size: int, folder: Path, port: int, patience: float) -> None:
    """One process of many that watch each other until the file leave-RANK is there, or raise-RANK."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = (folder / f"said-{rank}").open("w", buffering=1)
    with watched(join(rank, world_size, folder / "meeting"), patience):
        (folder / f"watching-{rank}").touch()
        while not (folder / f"leave-{rank}").exists():
            time.sleep(0.05)
            if (folder / f"raise-{rank}").exists():
                raise RuntimeError("Connection closed by peer")
