"""What only a GPU shows: whole calls of the zoo in every dtype, races, CUDA graphs, several devices, Inductor's code.

pytest tests/kernels/test_on_gpu.py --device cuda -m gpu
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels import calls
from tests.kernels.accuracy import inaccuracies
from tests.kernels.calls import EVERY_OP, Call, by_tma, in_one_pass
from tests.kernels.zoo_calls import describe, few_rows, zoo_calls

pytestmark = pytest.mark.gpu

# Experiments, which `benchmarks/gpu.sh experiments` runs, apart from the rest: what is in one pass, and by_tma.
IN_ONE_PASS = "group_norm, one pass"

SHARES = 14  # of the zoo's calls, each a test: one after another, their kernels would take minutes to compile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

FILLING_A_GPU: dict[str, Callable[[], Call]] = {
    "group_norm, whole groups": lambda: calls.group_norm(8, 512, 32, 32, groups=32, skip=256, film_rows=8),
    "group_norm, many whole groups, tiles": lambda: calls.group_norm(32, 512, 32, 32, groups=32, skip=256, film_rows=8),
    "group_norm, tiles": lambda: calls.group_norm(4, 64, 256, 256, groups=32, film_rows=2),
    IN_ONE_PASS: lambda: in_one_pass(calls.group_norm(4, 64, 256, 256, groups=32, film_rows=2)),
    "flash": lambda: calls.flash(4, 8, 1024, 1024, 64),
    "self_cross, 64 wide": lambda: calls.self_cross(4, 1024, 128, 8, 64),
    "self_cross, 96 wide": lambda: calls.self_cross(16, 256, 128, 8, 96, channels_last=False),
    "flash_by_tma": lambda: by_tma(calls.flash(4, 8, 1024, 1024, 64)),
    "self_cross_by_tma": lambda: by_tma(calls.self_cross(16, 256, 128, 8, 96)),
    "temporal": lambda: calls.temporal(4, 16, 1024, 8, 32, rotary=True),
    "multires_noise": lambda: calls.multires_noise(16, 3, 256, 256, strides=[1, 4]),
    "multires_loss": lambda: calls.multires_loss(16, 3, 256, 256, strides=[1, 4], rows=[10, 16]),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_small_call = pytest.mark.parametrize("make", EVERY_OP.values(), ids=EVERY_OP.keys())
every_large_call = pytest.mark.parametrize("make", FILLING_A_GPU.values(), ids=FILLING_A_GPU.keys())


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"result {i}"


# Accuracy


@every_dtype
@pytest.mark.parametrize("share", range(SHARES))
def test_calls_of_the_zoo_err_at_most_twice_as_much_as_pytorch(share, dtype):
    makers = {describe(maker): maker for maker in map(few_rows, zoo_calls().values())}
    faults = {name: inaccuracies(makers[name]().to(dtype)) for name in list(makers)[share::SHARES]}
    assert not any(faults.values()), "\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found)


@every_dtype
@every_small_call
def test_odd_sizes_err_at_most_twice_as_much_as_pytorch(make, dtype):
    assert not inaccuracies(make().to(dtype))


@every_dtype
@pytest.mark.parametrize("sizes", [(1024, 1024, 64), (256, 256, 96), (4096, 77, 128), (1, 4096, 32)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_errs_at_most_twice_as_much_as_sdpa(sizes, masked, dtype):
    queries, keys, width = sizes
    assert not inaccuracies(calls.flash(2, 8, queries, keys, width, masked=masked).to(dtype))


# The same bits whatever runs beside


@every_large_call
def test_ten_runs_give_the_same_bits(make):
    call = make().to(torch.bfloat16)
    expected = call.run("triton")
    for _ in range(9):
        assert_equal(call.run("triton"), expected)


@every_large_call
def test_concurrent_streams_give_the_same_bits(make):
    call = make().to(torch.bfloat16)
    expected = call.run("triton")
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(call.run("triton"))
    torch.cuda.synchronize()
    for result in results:
        assert_equal(result, expected)


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "size", "skip"), [(64, 256, 0), (32, 512, 0), (32, 1024, 0), (256, 128, 128), (60, 250, 30)], ids=str
)
def test_one_pass_computes_what_tiles_compute(channels, size, skip, channels_last, dtype):
    """The same tiles and sums; a group's are summed by more threads, in another order."""
    groups = 30 if channels == 60 else 32
    call = calls.group_norm(2, channels, size, size, skip=skip, groups=groups, channels_last=channels_last).to(dtype)
    expected = call.run("triton")
    for result, wanted in zip(in_one_pass(call).run("triton"), expected, strict=True):
        eps = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(result, wanted, rtol=eps, atol=eps * wanted.abs().max().item())


FOR_TMA: dict[str, Callable[[], Call]] = {
    "flash, 64 wide": lambda: calls.flash(2, 8, 1024, 1000, 64),
    "flash, 96 wide": lambda: calls.flash(2, 8, 250, 77, 96, masked=False),
    "flash, 128 wide": lambda: calls.flash(4, 8, 1000, 129, 128),
    "flash, 40 wide": lambda: calls.flash(2, 3, 33, 21, 40),
    "self_cross, 64 wide": lambda: calls.self_cross(16, 1024, 128, 8, 64, masked=False),
    "self_cross, 96 wide": lambda: calls.self_cross(2, 257, 77, 8, 96),
}
"""Keys that fill no tile and such that do, with few queries and many, held as one part and as two."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", FOR_TMA.values(), ids=FOR_TMA)
def test_attention_by_tma_errs_at_most_twice_as_much_as_pytorch(make, dtype):
    assert not inaccuracies(by_tma(make()).to(dtype))


# CUDA graphs


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run`, and the tensors that its replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and makes autograd's and cuBLAS's own first-time allocations
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@every_small_call
def test_a_graph_replays_forward_and_backward_on_new_values(make):
    call = make()
    graph, results = capture(lambda: call.run("triton"))
    call.mapped(lambda x: x.mul_(0.5) if x.is_floating_point() else x)
    graph.replay()
    assert_equal(results, call.run("triton"))


@pytest.mark.parametrize("make", FOR_TMA.values(), ids=FOR_TMA)
def test_a_graph_of_attention_by_tma_replays_on_new_values(make):
    call = by_tma(make()).to(torch.bfloat16)
    graph, results = capture(lambda: call.run("triton"))
    call.mapped(lambda x: x.mul_(0.5) if x.is_floating_point() else x)
    graph.replay()
    assert_equal(results, call.run("triton"))


def test_a_graph_draws_new_noise_when_its_seed_changes():
    calls_of_both = calls.multires_noise(2, 3, 8, 12, strides=[1, 4]), calls.multires_loss(2, 3, 8, 12, strides=[1, 4])
    for call in calls_of_both:
        seed = torch.tensor([5])
        in_tensor = dataclasses.replace(call, arguments=call.arguments | {"seed": seed})
        graph, results = capture(lambda in_tensor=in_tensor: in_tensor.run("triton"))
        for value in (6, 2**40):
            seed.fill_(value)
            graph.replay()
            in_int = dataclasses.replace(call, arguments=call.arguments | {"seed": value})
            assert_equal(results, in_int.run("triton"))


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_small_call
def test_a_call_runs_on_the_device_of_its_tensors_not_the_current_one(make):
    call = make()
    expected = call.run("triton")
    actual = call.mapped(lambda x: x.to("cuda:1")).run("triton")
    assert {x.device for x in actual} == {torch.device("cuda:1")}
    assert_equal([x.to("cuda:0") for x in actual], expected)
    with torch.cuda.device(1):
        assert_equal(call.run("triton"), expected)


# torch.compile


@pytest.mark.parametrize(
    "name", ["group_norm, skip", "flash", "self_cross", "temporal, rotary", "multires_noise", "multires_loss"]
)
def test_inductor_compiles_one_graph_with_the_same_results(name):
    call = EVERY_OP[name]()
    compiled = dataclasses.replace(call, function=torch.compile(call.function, fullgraph=True))
    torch.testing.assert_close(compiled.run("triton"), call.run("triton"))
