"""Processes that train into a store, for test_runs_in_stores.py, and a store that speaks S3."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import torch

from mdm_models.training import trainer
from mdm_models.training.checkpoint.store import Store
from mdm_models.training.config import TrainConfig
from mdm_models.training.monitor import run_lock
from tests import forked
from tests.training.models import LEAST_MODEL


def train(config: TrainConfig, environment: dict[str, str], said: Path, sent: Path, kill_at: str) -> None:
    """A training run as a process of its own, which writes down what it sends, and is killed before it sends a file
    whose name ends so."""
    forked.say_to(said)
    os.environ |= environment
    torch.set_num_threads(1)

    def put(self, file, name, put=Store.put):
        if kill_at and name.endswith(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, file, name)
        with sent.open("a") as lines:
            lines.write(f"{name}\n")

    Store.put = put
    run_lock.PATIENCE = 0.5  # on one machine
    trainer.train(config, LEAST_MODEL)


def run(config: TrainConfig, folder: Path, environments: list[dict[str, str]], kill_at: str = "") -> list[int | None]:
    """Such processes, each with its environment → their exit codes. What process i sent is in FOLDER/sent-i, what it
    said in FOLDER/said-i."""
    arguments = (
        (config, each, folder / f"said-{i}", folder / f"sent-{i}", kill_at) for i, each in enumerate(environments)
    )
    return forked.run_together(train, *arguments, seconds=500)


@contextlib.contextmanager
def bucket(name: str, log: Path) -> Iterator[dict[str, str]]:
    """A server of S3 with an empty bucket → the environment in which it is found."""
    port = forked.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            fsspec.filesystem("s3", endpoint_url=endpoint, key="key", secret="secret").mkdir(name)
            yield {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"} | secrets
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # they keep the address of this server
            server.terminate()
