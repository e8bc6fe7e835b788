"""Attention whose keys and values come by TMA: the bits of the path by addresses, what TMA cannot read, plans, graphs.

Interpreted, as all of this library's attention: that the machine has the instruction, and what the driver makes of a
descriptor, only a GPU shows (test_on_gpu.py).
"""

import gc
import importlib
import weakref

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import mdm_kernels as mk
from mdm_kernels import backend, plans, tma
from mdm_kernels.attention import launch
from tests.kernels import calls
from tests.kernels.calls import EVERY_OP, Call, by_tma
from tests.models.recorded_graph import RecordedGraph

CALLS = {
    "64 wide, one key in the last tile": lambda: calls.flash(queries=5, keys=65, width=64),
    "64 wide, full tiles": lambda: calls.flash(queries=64, keys=64, width=64, masked=False),
    "96 wide": lambda: calls.flash(batch=2, heads=2, queries=5, keys=7, width=96),
    "128 wide": lambda: calls.flash(queries=5, keys=7, width=128),
    "40 wide, held as 32 + 16": lambda: calls.flash(queries=5, keys=7, width=40, masked=False),
    "24 wide, held as 32": lambda: calls.flash(queries=5, keys=7, width=24),
    "self_cross, 64 wide": lambda: calls.self_cross(batch=2, tokens=5, context=7, heads=2, width=64),
    "self_cross, 96 wide": lambda: calls.self_cross(tokens=65, context=5, width=96, masked=False),
    "self_cross, 128 wide": lambda: calls.self_cross(tokens=5, context=7, width=128),
}


@pytest.fixture(autouse=True)
def interpreted(request):
    if request.config.getoption("device") != "cpu":
        pytest.skip("needs Triton's interpreter; what a GPU shows of TMA, test_on_gpu.py asks")


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, list[TensorDescriptor]]]:
    """The kernels that were launched without a plan, and the descriptors that they were given."""
    found, launch_one = [], backend.launch

    def noted(kernel, grid, **arguments):
        descriptors = [value for value in arguments.values() if isinstance(value, TensorDescriptor)]
        found.append((kernel.fn.__name__, descriptors))
        launch_one(kernel, grid, **arguments)

    monkeypatch.setattr(backend, "launch", noted)
    return found


def half(make) -> Call:
    return make().to(torch.float16)


def assert_same(results, expected):
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_results_and_gradients_are_those_of_the_path_by_addresses(make, launches):
    call = half(make)
    expected = call.run("triton")
    assert not any(descriptors for _, descriptors in launches)
    launches.clear()
    assert_same(by_tma(call).run("triton"), expected)
    assert [bool(descriptors) for _, descriptors in launches] == [True, True, False]  # out, dq; not dk and dv


def test_the_tiles_of_many_queries_are_read_by_tma(monkeypatch, launches):
    monkeypatch.setattr(launch, "FEW_QUERIES", 0)
    call = half(lambda: calls.self_cross(tokens=5, context=33, width=16))
    assert_same(by_tma(call).run("triton"), call.run("triton"))
    rows = {descriptor.block_shape[2] for _, descriptors in launches for descriptor in descriptors}
    assert rows == {64, 32}  # of the image's keys, and of the context's and of both in backward


def test_96_channels_are_read_as_64_and_32_of_one_packed_tensor(launches):
    call = half(lambda: calls.self_cross(batch=2, tokens=5, context=7, heads=2, width=96))
    with torch.no_grad(), mk.use_backend("triton"), tma.by_tma():
        call.function(**call.arguments)
    ((_, descriptors),) = launches
    qkv, context_kv = call.arguments["qkv"], call.arguments["context_kv"]
    assert [descriptor.block_shape for descriptor in descriptors] == [[1, 1, 64, 64], [1, 1, 64, 32]] * 2
    addresses = [descriptor.base.data_ptr() for descriptor in descriptors]
    assert addresses == [qkv.data_ptr()] * 2 + [context_kv.data_ptr()] * 2
    assert (descriptors[0].shape, descriptors[0].strides) == ([2, 6, 5, 96], [5 * 576, 96, 576, 1])
    assert (descriptors[2].shape, descriptors[2].strides) == ([2, 4, 7, 96], [7 * 384, 96, 384, 1])


def misaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


UNREADABLE = {
    "float32": lambda q: q.float(),
    "an address that 16 does not divide": misaligned,
    "a stride of a head that 16 bytes do not divide": lambda q: torch.cat([q, q[..., :4]], 3)[..., :16],
    "channels apart": lambda q: q.mT.contiguous().mT,
    "one sample for all": lambda q: q[:1].expand_as(q),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_what_tma_cannot_read_is_read_by_its_address(change, launches):
    q, k, v = torch.randn(3, 2, 2, 33, 16).half()
    k = change(k)
    q, v = q.to(k.dtype), v.to(k.dtype)
    with torch.no_grad(), mk.use_backend("triton"):
        expected = mk.flash_attention(q, k, v)
        with tma.by_tma():
            assert torch.equal(mk.flash_attention(q, k, v), expected)
    (_, descriptors) = launches[-1]
    assert not any(descriptor.base.data_ptr() == k.data_ptr() for descriptor in descriptors)
    assert len(descriptors) == (k.dtype == torch.float16)  # v's


def test_a_context_of_no_tokens_is_not_described(launches):
    call = half(lambda: calls.self_cross(tokens=5, context=0, masked=False))
    assert_same(by_tma(call).run("triton"), call.run("triton"))
    assert all(descriptor.base.shape[1] == 5 for _, descriptors in launches for descriptor in descriptors)


def test_a_packed_tensor_whose_channels_lie_apart_is_read_by_its_address(launches):
    call = half(EVERY_OP["self_cross, NCHW"])
    assert_same(by_tma(call).run("triton"), call.run("triton"))
    _, described = launches[0]
    assert {descriptor.base.shape for descriptor in described} == {call.arguments["context_kv"].shape}


# Plans and graphs


@pytest.fixture
def interpreted_kernels_are_planned(monkeypatch):
    def compiled_launch(kernel, grid, arguments, compiled):
        options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
        return lambda *values: kernel[grid](*values, **options)

    monkeypatch.setattr(plans, "compiled_launch", compiled_launch)


@pytest.mark.usefixtures("interpreted_kernels_are_planned")
@pytest.mark.parametrize("name", ["40 wide, held as 32 + 16", "self_cross, 128 wide"])
def test_a_plan_describes_the_tensors_of_each_call(name, launches):
    first, second = half(CALLS[name]), half(CALLS[name])
    expected = second.run("triton")
    by_tma(first).run("triton")
    launches.clear()
    with tma.by_tma():
        first.run("triton")
        assert len(launches) == 3
        assert_same(second.run("triton"), expected)
    assert len(launches) == 3


@pytest.mark.usefixtures("interpreted_kernels_are_planned")
def test_a_plan_keeps_no_tensor_of_its_first_call():
    with torch.no_grad(), mk.use_backend("triton"), tma.by_tma():
        q, k, v = (torch.randn(1, 1, 5, 16).half() for _ in range(3))
        mk.flash_attention(q, k, v)
        kept = [weakref.ref(x.untyped_storage()) for x in (q, k, v)]
        assert any(plans._plans)
        del q, k, v
        gc.collect()
        assert not any(ref() for ref in kept)


def test_a_captured_graph_reads_new_values_where_the_old_ones_were(launches):
    """A graph keeps descriptors as it keeps addresses: of the memory that was there when it was captured."""
    call = half(CALLS["40 wide, held as 32 + 16"])
    inputs = [x for name, x in call.arguments.items() if name in call.differentiable]
    with torch.no_grad(), mk.use_backend("triton"), tma.by_tma():
        with RecordedGraph() as graph:
            result = call.function(**call.arguments)
        captured = [descriptor.base.data_ptr() for _, described in launches for descriptor in described]
        launches.clear()
        for x in inputs:
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [descriptor.base.data_ptr() for _, described in launches for descriptor in described]
        assert torch.equal(result, call.function(**call.arguments))
    assert captured == replayed
    assert set(captured) == {x.data_ptr() for x in inputs[1:]}  # k and v


# The switch


def test_it_is_off_unless_asked_for(launches):
    call = half(CALLS["24 wide, held as 32"])
    call.run("triton")
    assert not any(described for _, described in launches)


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setattr(tma, "_tma", "0")  # which is so again after the test
    monkeypatch.setenv("MDM_KERNELS_TMA", "yes")
    with pytest.raises(ValueError, match="MDM_KERNELS_TMA is 'yes'"):
        importlib.reload(tma)
