"""Real processes, killed or failing at any moment, alone and together."""

import multiprocessing
import random
import time
from itertools import pairwise

import pytest
import torch

from mdm_models.training.checkpoint import list_steps, verified_manifest
from tests.training import checkpoint_processes as processes
from tests.training.checkpoint_processes import alone, flat_state, is_of_one_step, trained

KILLED = -9


def tensors(state: dict) -> dict:
    return {part: state[part] for part in ("model", "ema")} | {"moments": state["optimizer"]["state"]}


@pytest.fixture(scope="module")
def context():
    """Starts processes from one that has imported everything, which takes no time, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([processes.__name__])
    return context


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
    for _ in range(5):
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


def together(context, work, world: int, folder) -> None:
    """Run `work` as so many processes at once."""
    members = [context.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
    assert [member.exitcode for member in members] == [0] * world


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory, context):
    folder = tmp_path_factory.mktemp("runs")
    together(context, processes.save_together, 2, folder)
    return folder


@pytest.fixture(scope="module")
def loaded_by_three(saved_by_two, context):
    path = list_steps(saved_by_two / "sharded")[-1] / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])  # of which one process alone will notice
    together(context, processes.load_together, 3, saved_by_two)
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
