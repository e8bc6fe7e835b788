"""Real processes that begin where one stands which has imported everything and has no threads: each would else import
torch and the trainer first, for some seconds. What torchrun and a new interpreter do is tested where they are started:
tests/recipes/test_t2v_webvid.py, tests/docs/test_cluster.py, tests/training/test_faults.py."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

IMPORTED = [
    "tests.unsynced",
    "mdm_models.cli",
    "torch._dynamo",  # which DDP, FSDP and fused Adam import
    *(f"tests.training.{name}" for name in ("fault_processes", "remote_run", "ranks")),
]


def context() -> ForkServerContext:
    """What starts such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_together(work: Callable, *arguments: tuple, seconds: float = 300) -> list[int | None]:
    """Run `work` in so many processes at once, each with its arguments → their exit codes; None if one still runs."""
    members = [context().Process(target=work, args=each) for each in arguments]
    for member in members:
        member.start()
    for member in members:
        member.join(seconds)
    return [member.exitcode for member in members]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def world(size: int) -> list[dict[str, str]]:
    """The environments by which so many processes find each other, as torchrun makes them."""
    joining = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [joining | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def say_to(file: Path) -> None:
    """Append this process's output to a file. Else it goes wherever that of the test went which first had one."""
    with file.open("a") as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)


def mdm(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    """Be `mdm ARGUMENTS`, whose output goes to a file."""
    from mdm_models import cli

    os.environ |= environment
    torch.set_num_threads(1)
    say_to(said)
    sys.exit(cli.main(arguments))
