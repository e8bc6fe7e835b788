"""The emulation of a GPU's approximate functions: as rough as documented, and no rougher."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mdm_kernels import backend

pytestmark = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="a GPU needs no emulation")


@triton.jit
def functions(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + 0 * N + i, tl.exp2(x))
    tl.store(out_ptr + 1 * N + i, tl.exp(x))
    tl.store(out_ptr + 2 * N + i, tl.log2(x))
    tl.store(out_ptr + 3 * N + i, tl.sqrt(x))
    tl.store(out_ptr + 4 * N + i, tl.rsqrt(x))
    tl.store(out_ptr + 5 * N + i, 1.7 / x)
    tl.store(out_ptr + 6 * N + i, tl.sqrt_rn(x))
    tl.store(out_ptr + 7 * N + i, tl.div_rn(tl.full([BLOCK], 1.7, tl.float32), x))


@pytest.fixture
def errors() -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors of each function in `functions`, and its arguments."""
    x = torch.rand(1024) * 6 + 2
    out = torch.empty(8, 1024)
    backend.launch(functions, (1,), x_ptr=x, out_ptr=out, N=1024, BLOCK=1024)
    exact = x.double()
    scale = float(np.float32(1.7))
    exact = torch.stack(
        [exact.exp2(), exact.exp(), exact.log2(), exact.sqrt(), exact.rsqrt(), scale / exact, exact.sqrt(),
         scale / exact]
    )  # fmt: skip
    return (out.double() - exact).abs() / exact, x


def test_each_function_errs_about_as_much_as_the_manual_says(errors):
    """Half a unit of rounding, 2⁻²⁴, comes on top; exp also rounds the product with log₂ e."""
    found, x = errors
    largest, rounding = found.amax(1), 2.0**-24
    documented = torch.tensor(
        [2.0**-22, 2.0**-22 + x.max() * 1.45 * rounding, 2.0**-22, 2.0**-23, 2.0**-22.9, 2.0**-22]
    )
    assert (largest[:6] <= documented + 1.01 * rounding).all()
    assert (largest[:6] >= documented / 2).all()


def test_rounded_functions_stay_exact(errors):
    assert (errors[0][6:] <= 2.0**-24).all()


def test_the_same_arguments_give_the_same_result(errors):
    x, out = errors[1], torch.empty(2, 8, 1024)
    for i in range(2):
        backend.launch(functions, (1,), x_ptr=x, out_ptr=out[i], N=1024, BLOCK=1024)
    assert torch.equal(out[0], out[1])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_zero_infinity_and_one_stay_what_they_are():
    x = torch.tensor([0.0, float("-inf")]).repeat(8)
    out = torch.empty(8, 16)
    backend.launch(functions, (1,), x_ptr=x, out_ptr=out, N=16, BLOCK=16)
    assert out[:2, :2].tolist() == [[1, 0], [1, 0]]
    assert out[3, 0] == 0
