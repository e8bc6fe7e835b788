"""Real processes, killed or failing at any moment, alone and together."""

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mdm_models.training.checkpoint.checkpoints import list_steps, verified_manifest
from mdm_models.training.config import TrainConfig, changed
from tests import forked
from tests.made_data import encode_image, write_shard
from tests.training import fault_processes as processes
from tests.training import restarted
from tests.training.fault_processes import alone, flat_state, is_of_one_step, trained

KILLED = -9
ROOT = Path(__file__).parents[2]


def tensors(state: dict) -> dict:
    return {part: state[part] for part in ("model", "ema")} | {"moments": state["optimizer"]["state"]}


@pytest.fixture(scope="module")
def context():
    return forked.context()


def newest_step(run, elements: int = 1000) -> int:
    """The step that a run continues from, all of whose checkpoints must be whole."""
    for path in list_steps(run):
        verified_manifest(path)
    state = flat_state(0, elements)
    assert alone(run, keep=1).load_newest(state)
    assert is_of_one_step(state)
    return state["counters"]["step"]


def test_killed_at_any_change_of_the_file_system_a_save_leaves_the_old_or_the_new_one(tmp_path, context):
    run = tmp_path / "run"
    first = alone(run, keep=1)
    first.save(1, flat_state(1))
    first.finish()
    steps = [1]  # what the run would go on from, after each kill
    exit_code = KILLED
    while exit_code == KILLED:
        moment = len(steps)
        saving = context.Process(target=processes.save_and_die_at, args=(run, steps[-1] + 1, moment))
        saving.start()
        saving.join()
        exit_code = saving.exitcode
        steps.append(newest_step(run))
    assert exit_code == 0
    assert len(steps) > 10
    assert all(after - before in (0, 1) for before, after in pairwise(steps))
    assert steps[3] == 1  # killed before the new one was complete
    assert steps[-3] > 2  # and after it, while the old one was deleted
    assert len(list((run / "checkpoints").iterdir())) == 1  # nothing is left of those that were killed


def test_killed_at_random_moments_a_run_keeps_what_it_had_saved(tmp_path, context):
    run, elements, moments = tmp_path / "run", 1_000_000, random.Random(0)
    saved = 0
    for _ in range(3):
        hears, tells = context.Pipe(duplex=False)
        saving = context.Process(target=processes.save_until_killed, args=(run, elements, tells))
        saving.start()
        while hears.recv() < saved + 2:  # it went on from where the last one was killed, if it gets there
            pass
        time.sleep(moments.uniform(0, 0.1))
        saving.kill()
        saving.join()
        while hears.poll():
            saved = hears.recv()
        assert newest_step(run, elements) >= saved
        saved = newest_step(run, elements)


def together(work, world_size: int, folder) -> None:
    """Run `work` as so many processes at once."""
    assert forked.run_together(work, *((rank, world_size, folder) for rank in range(world_size))) == [0] * world_size


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    together(processes.save_together, 2, folder)
    return folder


@pytest.fixture(scope="module")
def loaded_by_three(saved_by_two):
    path = list_steps(saved_by_two / "sharded")[-1] / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])  # of which one process alone will notice
    together(processes.load_together, 3, saved_by_two)
    return saved_by_two


@pytest.mark.parametrize("sharded", [True, False], ids=["as shards", "as replicas"])
@pytest.mark.parametrize(("kind", "step"), [("sharded", 1), ("replicated", 2)])
def test_three_processes_go_on_from_what_two_saved(loaded_by_three, kind, step, sharded):
    for rank in range(3):
        state = torch.load(loaded_by_three / f"{kind}-{sharded}-{rank}.pt", weights_only=True)
        assert state["counters"] == {"step": step}
        torch.testing.assert_close(tensors(state), tensors(trained(step, False)), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "step"), [("sharded", 1), ("replicated", 2)])
def test_one_process_without_a_group_goes_on_from_what_two_saved(loaded_by_three, kind, step, recwarn):
    state = trained(9, False)
    alone(loaded_by_three / kind, keep=2).load_newest(state)
    torch.testing.assert_close(tensors(state), tensors(trained(step, False)), rtol=0, atol=0)


def test_both_of_two_processes_write_what_both_hold(saved_by_two):
    files = verified_manifest(list_steps(saved_by_two / "replicated")[-1])["files"]
    first, second = files["__0_0.distcp"][0], files["__1_0.distcp"][0]
    assert 0.25 < second / (first + second) < 0.75


def test_what_one_process_fails_to_write_fails_on_the_other_and_leaves_the_last_one(saved_by_two):
    failure = (saved_by_two / "failure-0").read_text()
    assert "step-00000003 cannot be written ([Errno 27] File too large)" in failure
    assert failure.endswith("step-00000002")
    assert [path.name for path in (saved_by_two / "replicated" / "checkpoints").iterdir()].count("step-00000003") == 0


class Runs:
    """Starts one training run again and again, each time as so many processes."""

    def __init__(self, context, config: TrainConfig):
        self.context, self.config = context, config
        self.processes = []

    def start(self, world_size: int = 1) -> "Runs":
        members = forked.world(world_size)
        self.processes = [self.context.Process(target=processes.train, args=(self.config, each)) for each in members]
        for process in self.processes:
            process.start()
        return self

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def finish(self) -> "Runs":
        for process in self.processes:
            process.join(300)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes)
        return self

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def newest(self) -> int:
        """The step it would go on from; 0 if it would start over."""
        paths = list_steps(Path(self.config.out))
        return int(paths[-1].name.removeprefix("step-")) if paths else 0

    def kill_beyond(self, step: int, delay: float) -> None:
        """Kill it, but for its having ended, so many seconds after it has a checkpoint of a later step."""
        while self.alive and self.newest() <= step:
            time.sleep(0.002)
        time.sleep(delay)
        self.kill()

    def losses(self) -> list[tuple[int, float]]:
        lines = (Path(self.config.out) / "log.jsonl").read_text().splitlines()
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run on five pictures that is nearly always writing a checkpoint."""
    pictures = {grey: np.full((16, 16, 3), grey, np.uint8) for grey in range(0, 250, 50)}
    samples = {str(grey): {"png": encode_image(picture), "txt": b"grey"} for grey, picture in pictures.items()}
    shard = write_shard(tmp_path_factory.mktemp("data") / "a.tar", samples)
    return processes.often_saving(shard, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(context, recipe):
    """Its losses."""
    return Runs(context, recipe).start().finish().losses()


def test_a_run_killed_again_and_again_has_the_losses_of_an_undisturbed_one(context, recipe, undisturbed, tmp_path):
    killed = Runs(context, changed(recipe, out=str(tmp_path / "run")))
    moments = random.Random(1)
    for _ in range(2):
        killed.start().kill_beyond(killed.newest(), moments.uniform(0, 0.1))
    assert 0 < killed.newest() < 12
    assert killed.start().finish().losses() == undisturbed


def test_torchrun_restarts_a_run_whose_worker_is_killed_and_it_goes_on(recipe, undisturbed, tmp_path):
    run = tmp_path / "run"
    data, out = recipe.data.shards[0], str(run)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    mended = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, restarted.__file__, data, out]
    done = subprocess.run(command, env=os.environ | mended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (run / "killed").exists()
    losses = Runs(None, changed(recipe, out=out)).losses()
    assert [step for step, _ in losses] == list(range(1, 13))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(undisturbed), rtol=1e-3, atol=0)


def test_two_processes_killed_and_followed_by_one_have_its_losses(context, recipe, undisturbed, tmp_path):
    killed = Runs(context, changed(recipe, out=str(tmp_path / "run")))
    killed.start(world_size=2).kill_beyond(2, 0.1)
    assert 0 < killed.newest() < 12
    losses = killed.start().finish().losses()
    assert [step for step, _ in losses] == list(range(1, 13))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(undisturbed), rtol=1e-3, atol=0)
