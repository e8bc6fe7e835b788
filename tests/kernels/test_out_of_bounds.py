"""No kernel reads or writes outside its tensors: each of them lies in a buffer of NaN that must not reach a result and
must still be there afterwards. The interpreter, which reads and writes real memory, also shows every address."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mdm_kernels import backend
from tests.kernels import calls
from tests.kernels.calls import EVERY_OP, by_tma
from tests.kernels.group_norm_paths import PATHS, along
from tests.kernels.watch import span

GUARD = 2**15  # elements on each side of a tensor: more than a tile
NAN = 255  # as every byte of an element, of any floating-point dtype


class Guards:
    """Makes tensors inside buffers of NaN, and tells whether those have changed."""

    def __init__(self):
        self.outsides: list[tuple[Tensor, Tensor]] = []

    def place(self, x: Tensor) -> Tensor:
        """x's values, in its strides, with GUARD elements of NaN on both sides and between rows that do not touch."""
        elements = (span(x) if x.numel() else 0) + 2 * GUARD
        memory = torch.full((elements * x.itemsize,), NAN, dtype=torch.uint8, device=x.device)
        outside = torch.ones(elements, dtype=torch.bool, device=x.device)
        outside.as_strided(x.shape, x.stride(), GUARD).fill_(False)
        self.outsides.append((memory, outside))
        return memory.view(x.dtype).as_strided(x.shape, x.stride(), GUARD).copy_(x)

    @contextlib.contextmanager
    def allocating(self):
        """Inside the block, PyTorch's allocations made from Python are placed too."""

        def placing(allocate):
            return lambda *args, **options: self.place(allocate(*args, **options))

        with pytest.MonkeyPatch.context() as patch:
            for owner, names in (
                (torch, ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")),
                (torch.Tensor, ("new_empty", "new_zeros")),
            ):
                for name in names:
                    patch.setattr(owner, name, placing(getattr(owner, name)))
            yield

    def assert_untouched(self) -> None:
        for memory, outside in self.outsides:
            assert (memory.view(len(outside), -1)[outside] == NAN).all()


@pytest.fixture(params=PATHS)
def path_of_group_norm(request):
    with along(request.param):
        yield


def check(call) -> None:
    expected = call.run("triton")
    guards = Guards()
    guarded = call.mapped(guards.place)
    with guards.allocating():
        actual = guarded.run("triton")
    guards.assert_untouched()
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all(), f"result {i}"
        assert torch.equal(a, e), f"result {i}"


@pytest.mark.usefixtures("watched_addresses")
@pytest.mark.parametrize("width", [24, 40])
def test_attention_by_tma_reads_nothing_outside(width):
    """Whose tiles, 32 and 32 + 16 wide, end beyond the channels of the last head."""
    check(by_tma(calls.flash(batch=2, heads=2, queries=5, keys=7, width=width)).to(torch.float16))


@pytest.mark.usefixtures("watched_addresses")
@pytest.mark.parametrize("name", [name for name in EVERY_OP if not name.startswith("group_norm")])
def test_nothing_outside_is_read_or_written(name):
    check(EVERY_OP[name]())


@pytest.mark.usefixtures("watched_addresses", "path_of_group_norm")
@pytest.mark.parametrize("name", [name for name in EVERY_OP if name.startswith("group_norm")])
def test_group_norm_reads_and_writes_nothing_outside(name):
    check(EVERY_OP[name]())


@triton.jit
def copy_tile(x_ptr, y_ptr, loaded, stored, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.sum(tl.load(x_ptr + i, i < loaded, other=0.0)) + i
    tl.store(y_ptr + i, x, i < stored)


@pytest.mark.parametrize("loaded", [5, 6])
def test_guards_notice_an_element_too_many(loaded):
    guards = Guards()
    x, y = guards.place(torch.ones(5)), guards.place(torch.zeros(5))
    backend.launch(copy_tile, (1,), x_ptr=x, y_ptr=y, loaded=loaded, stored=5, BLOCK=8)
    guards.assert_untouched()
    assert y.isnan().any() == (loaded == 6)
    backend.launch(copy_tile, (1,), x_ptr=x, y_ptr=y, loaded=5, stored=6, BLOCK=8)
    with pytest.raises(AssertionError):
        guards.assert_untouched()


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="only the interpreter shows addresses")
@pytest.mark.usefixtures("watched_addresses")
@pytest.mark.parametrize(("loaded", "stored"), [(5, 5), (6, 5), (5, 6)])
def test_the_watch_notices_an_element_too_many(loaded, stored):
    arguments = {"x_ptr": torch.ones(5), "y_ptr": torch.zeros(5), "loaded": loaded, "stored": stored, "BLOCK": 8}
    if loaded == stored == 5:
        backend.launch(copy_tile, (1,), **arguments)
    else:
        with pytest.raises(Exception, match="outside its tensors"):
            backend.launch(copy_tile, (1,), **arguments)


@triton.jit
def write_same(y_ptr, step, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * step + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


@triton.jit
def load_some(x_ptr, y_ptr, loaded, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < loaded))


only_the_interpreter = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="only the interpreter shows addresses"
)


@only_the_interpreter
@pytest.mark.usefixtures("watched_addresses")
@pytest.mark.parametrize("step", [4, 3])
def test_the_watch_notices_a_store_written_by_two_programs(step):
    arguments = {"y_ptr": torch.zeros(8), "step": step, "BLOCK": 4}
    if step == 4:
        backend.launch(write_same, (2,), **arguments)
    else:
        with pytest.raises(AssertionError, match="two programs write the same element"):
            backend.launch(write_same, (2,), **arguments)


@only_the_interpreter
@pytest.mark.usefixtures("watched_addresses")
@pytest.mark.parametrize("loaded", [8, 5])
def test_the_watch_notices_a_masked_load_without_other(loaded):
    arguments = {"x_ptr": torch.zeros(8), "y_ptr": torch.zeros(8), "loaded": loaded, "BLOCK": 8}
    if loaded == 8:
        backend.launch(load_some, (1,), **arguments)
    else:
        with pytest.raises(Exception, match="says nothing of the elements"):
            backend.launch(load_some, (1,), **arguments)
