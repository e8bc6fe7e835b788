"""Launches worked out once: what later calls with their plan compute, and which calls share one."""

import threading

import pytest
import torch

import mdm_kernels as mk
from mdm_kernels import backend, plans
from mdm_kernels.group_norm import launch as group_norm_launch
from tests.kernels import calls
from tests.kernels.calls import EVERY_OP, Call


@pytest.fixture(autouse=True)
def interpreted_kernels_are_planned(request, monkeypatch):
    """As compiled ones are, by their arguments in order."""
    if request.config.getoption("device") != "cpu":
        return

    def launch(kernel, grid, arguments, compiled):
        options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        return lambda *values: kernel[grid](*values, **options)

    monkeypatch.setattr(plans, "compiled_launch", launch)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched without a plan."""
    found, launch_one = [], backend.launch

    def noted(kernel, grid, **arguments):
        found.append(kernel.fn.__name__)
        launch_one(kernel, grid, **arguments)

    monkeypatch.setattr(backend, "launch", noted)
    return found


def unplanned(call: Call) -> list[torch.Tensor]:
    plans.forget()
    results = call.run("triton")
    plans.forget()
    return results


def assert_same(results, expected):
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", EVERY_OP)
def test_calls_of_one_plan_compute_the_same_as_calls_without(name, launches):
    first, second = EVERY_OP[name](), EVERY_OP[name]()
    expected = unplanned(second)
    first.run("triton")
    launches.clear()
    assert_same(second.run("triton"), expected)
    assert bool(launches) == name.startswith("multires")  # its kernels take a seed, which no plan could wait for


def by_tiles(monkeypatch):
    monkeypatch.setattr(group_norm_launch, "WHOLE_GROUP_BYTES", 0)


def test_a_plan_of_several_launches_has_scratch_of_its_own(monkeypatch, launches):
    by_tiles(monkeypatch)
    first, second = (calls.group_norm(2, 6, 5, 7, film_rows=1) for _ in range(2))
    expected = unplanned(second)
    first.run("triton")
    launches.clear()
    assert_same(second.run("triton"), expected)
    assert not launches


def test_one_tensor_given_twice_and_two_tensors_share_a_plan():
    with mk.use_backend("triton"), torch.no_grad():
        q, k, v = torch.randn(3, 1, 1, 5, 16)
        expected = mk.flash_attention(q, k, v)
        plans.forget()
        mk.flash_attention(q, q, q)
        assert torch.equal(mk.flash_attention(q, k, v), expected)


def group_norm(x, weight=None, num_groups=2, eps=1e-5):
    with mk.use_backend("triton"), torch.no_grad():
        return mk.group_norm_silu(x, num_groups, weight, eps=eps)


@pytest.mark.parametrize("other", ["shape", "stride", "dtype", "alignment", "option", "absence"])
def test_calls_that_differ_do_not_share_a_plan(other, launches):
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(4)
    group_norm(x, weight)
    group_norm(x + 1, weight)
    assert len(launches) == 1
    changed = {
        "shape": (x[:1].clone(), weight),
        "stride": (x.contiguous(memory_format=torch.channels_last), weight),
        "dtype": (x, weight.half()),
        "alignment": (torch.randn(2 * 4 * 9 + 1)[1:].view(x.shape), weight),
        "option": (x, weight, 4),
        "absence": (x,),
    }[other]
    group_norm(*changed)
    assert len(launches) == 2


def test_what_launches_a_copy_is_not_planned(launches):
    x, weight = torch.randn(2, 2, 4, 3, 3), torch.randn(2, 8)
    plain = [group_norm(x[i], weight[i, ::2].clone()) for i in range(2)]
    launches.clear()
    assert_same([group_norm(x[i], weight[i, ::2]) for i in range(2)], plain)
    assert len(launches) == 2


def test_there_are_at_most_so_many_plans_of_a_function(monkeypatch, launches):
    monkeypatch.setattr(plans, "MOST", 3)
    xs = [torch.randn(rows, 2, 2, 2) for rows in range(1, 5)]
    for x in (*xs, *xs[2:]):
        group_norm(x)
    assert len(launches) == 4
    assert max(map(len, plans._plans)) == 3
    group_norm(xs[0])  # the oldest went
    assert len(launches) == 5


def test_threads_that_make_plans_at_once_keep_to_that(monkeypatch):
    monkeypatch.setattr(plans, "_plans", [])
    monkeypatch.setattr(plans, "MOST", 1)
    both = threading.Barrier(2, timeout=60)
    launching = plans.planned(lambda x: both.wait())
    threads = [threading.Thread(target=launching, args=(torch.ones(size),)) for size in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans._plans[0]) == 1


def test_a_launch_by_plan_is_counted_and_recorded():
    x = torch.randn(2, 4, 3, 3)
    recorded = []
    with mk.what_ran() as ran:
        group_norm(x)
        group_norm(x)
    with backend.recording(lambda kernel, arguments: recorded.append(kernel.fn.__name__)):
        group_norm(x)
    assert ran.kernels == {("held_group_forward", str(x.device)): 2}
    assert recorded == ["held_group_forward"]


def test_a_choice_of_kernels_takes_effect_at_once(monkeypatch, launches):
    by_tiles(monkeypatch)
    x = torch.randn(2, 4, 3, 3)
    for way in ("0", "1", "0"):
        with group_norm_launch.one_pass(way):
            group_norm(x)
            group_norm(x)
    tiles = ["tile_statistics", "combine_statistics", "apply_forward"]
    assert launches == [*tiles, "one_pass_forward", *tiles]
