"""group_norm_silu of x and a skip: in values and gradients that of torch.cat([x, skip], 1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_kernels import GroupNormSiLU, group_norm_silu
from mdm_kernels.backend import recording, use_backend
from tests.kernels.group_norm_accuracy import check, inputs, result_and_gradients, triton
from tests.kernels.group_norm_paths import PATHS

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def two_inputs(rows, channels, skip_channels, size, memory_format=torch.contiguous_format, film_rows=None, **options):
    """(x, weight, bias, scale, shift), skip; both of one memory format."""
    joined, *parameters = inputs((rows, channels + skip_channels, *size), film_rows=film_rows, **options)
    x, skip = (part.contiguous(memory_format=memory_format) for part in joined.split([channels, skip_channels], 1))
    return (x, *parameters), skip


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("channels", "skip_channels", "num_groups"),
    [(16, 16, 4), (16, 8, 4), (8, 40, 2), (48, 32, 2), (3, 11, 2), (1, 5, 1)],
    ids=["border of groups", "straddling group", "24-wide groups", "40-wide groups", "odd widths", "one channel"],
)
def test_equals_the_definition_of_the_concatenation(path, channels, skip_channels, num_groups, memory_format):
    tensors, skip = two_inputs(2, channels, skip_channels, (6, 5), memory_format, film_rows=2)
    check(tensors, num_groups, path=path, skip=skip)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 3),
    num_groups=st.integers(1, 3),
    width=st.integers(2, 17),
    border=st.floats(0, 1),
    size=st.tuples(st.integers(2, 7), st.integers(1, 7)),
    memory_format=st.sampled_from(list(FORMATS.values())),
    film=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_any_widths_and_any_border(path, rows, num_groups, width, border, size, memory_format, film, activation):
    channels = 1 + round(border * (num_groups * width - 2))
    tensors, skip = two_inputs(
        rows, channels, num_groups * width - channels, size, memory_format, rows if film else None
    )
    check(tensors, num_groups, activation, path, skip)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("path", PATHS)
def test_groups_larger_than_a_block(path, memory_format):
    tensors, skip = two_inputs(1, 5, 4, (75, 70), memory_format, film_rows=1)
    check(tensors, 3, path=path, skip=skip)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_of_scale_serves_consecutive_frames(path):
    tensors, skip = two_inputs(6, 5, 3, (5, 3), film_rows=2)
    check(tensors, 4, path=path, skip=skip)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(path, dtype):
    tensors, skip = two_inputs(2, 16, 8, (6, 7), torch.channels_last, film_rows=2, dtype=dtype)
    check(tensors, 3, path=path, skip=skip)


@pytest.mark.parametrize("path", PATHS)
def test_no_cancellation_where_both_are_far_from_zero(path):
    tensors, skip = two_inputs(2, 5, 3, (8, 8), mean=10000.0, std=0.1)
    check(tensors, 2, path=path, skip=skip)


@pytest.mark.parametrize("x_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_result_has_the_memory_format_of_x_whatever_that_of_the_skip(backend, x_format):
    (x, *_), skip = two_inputs(2, 5, 3, (4, 6), x_format)
    other_format = next(other for other in FORMATS.values() if other is not x_format)
    with use_backend(backend):
        y = group_norm_silu(x, 4, skip=skip.contiguous(memory_format=other_format))
        expected = group_norm_silu(torch.cat([x, skip], 1).contiguous(memory_format=x_format), 4)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_gradients_of_a_view_of_a_wider_tensor(backend, memory_format):
    """Both inputs are channel slices, dense in neither memory format."""
    wide = torch.randn(2, 24, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    dy = torch.randn(2, 12, 4, 5)

    def normalised(wide):
        return group_norm_silu(wide[:, 2:10], 3, skip=wide[:, 15:19])

    (exact,) = result_and_gradients(normalised, [wide], dy)[1:]
    with use_backend(backend):
        (gradient,) = result_and_gradients(normalised, [wide.float()], dy)[1:]
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("rows", "size"), [(0, (4, 4)), (2, (0, 4))])
def test_empty_inputs_have_zero_gradients(backend, rows, size):
    tensors, skip = two_inputs(rows, 5, 3, size, film_rows=2)
    with use_backend(backend):
        y, *gradients = result_and_gradients(
            lambda skip, x, w, b, s, t: group_norm_silu(x, 4, w, b, skip=skip, scale=s, shift=t),
            (skip, *tensors),
            torch.zeros(rows, 8, *size),
        )
    assert y.shape == (rows, 8, *size)
    assert [g.shape for g in gradients] == [t.shape for t in (skip, *tensors)]
    assert all((g == 0).all() for g in gradients)


def test_only_the_skip_needs_a_gradient():
    (x, *_), skip = two_inputs(2, 5, 3, (4, 3))
    with triton():
        (gradient,) = torch.autograd.grad(group_norm_silu(x, 4, skip=skip.requires_grad_()).sum(), skip)
    (exact,) = torch.autograd.grad(group_norm_silu(x.double(), 4, skip=skip.double()).sum(), skip)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hip", "version", "takes_a_skip"), [(None, "3.6.0", True), ("7.0", "3.9.1", True), ("7.0", "3.6.0", False)]
)
def test_a_compiler_that_cannot_choose_pointers_gets_the_concatenation(monkeypatch, hip, version, takes_a_skip):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("triton.__version__", version)
    x, skip = torch.ones(2, 5, 4, 3), torch.ones(2, 3, 4, 3)
    launches = []
    with triton(), recording(lambda kernel, arguments: launches.append(arguments)):
        group_norm_silu(x, 4, skip=skip)
    first, *_ = launches
    assert (first["x_ptr"].shape[1], first["skip_ptr"] is not None) == ((5, True) if takes_a_skip else (8, False))


def test_module_takes_a_skip():
    module = GroupNormSiLU(4, 8)
    (x, _, _, scale, shift), skip = two_inputs(2, 5, 3, (4, 3), film_rows=2)
    expected = module(torch.cat([x, skip], 1), scale, shift)
    torch.testing.assert_close(module(x, scale, shift, skip=skip), expected)


@pytest.mark.parametrize(
    ("skip", "error", "message"),
    [
        ([1.0], TypeError, r"skip is list"),
        (torch.ones(2, 3, 4, 5, dtype=torch.int64), TypeError, r"skip is torch.int64"),
        (torch.ones(2, 3, 4, 5).half(), TypeError, r"skip is torch.float16 and x torch.float32; .* convert"),
        (torch.ones(2, 3, 4, 5, device="meta"), ValueError, r"skip is on meta and x on "),
        (torch.ones(1, 3, 4, 5), ValueError, r"skip has shape \(1, 3, 4, 5\); .* it must be \(2, channels, 4, 5\)"),
        (torch.ones(2, 3, 5, 4), ValueError, r"skip has shape \(2, 3, 5, 4\)"),
        (torch.ones(2, 3, 4), ValueError, r"skip has shape \(2, 3, 4\)"),
        (torch.ones(2), ValueError, r"skip has shape \(2,\)"),
        (torch.ones(2, 0, 4, 5), ValueError, r"skip has shape \(2, 0, 4, 5\)"),
        (torch.ones(2, 2, 4, 5), ValueError, r"must divide the 7 channels of x \(2, 5, 4, 5\) and skip \(2, 2, 4, 5\)"),
    ],
)
def test_a_skip_that_does_not_fit_is_named(skip, error, message):
    with pytest.raises(error, match=message):
        group_norm_silu(torch.ones(2, 5, 4, 5), 4, skip=skip)


def test_parameters_must_have_the_channels_of_both():
    x, skip = torch.ones(2, 5, 4, 5), torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\); it must be \(8,\), the channels of x and skip"):
        group_norm_silu(x, 4, torch.ones(5), skip=skip)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 5\); it must be \(N / T, 8\)"):
        group_norm_silu(x, 4, scale=torch.ones(2, 5), skip=skip)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_ops_are_registered_correctly(memory_format):
    (x, *parameters), skip = two_inputs(1, 5, 3, (3, 2), memory_format, film_rows=1)
    ops = torch.ops.mdm_kernels
    leaves = [tensor if tensor is None else tensor.clone().requires_grad_() for tensor in (x, skip, *parameters)]
    torch.library.opcheck(ops.group_norm_silu_forward, (*leaves[:2], 2, *leaves[2:], 1e-5, True))
    y, mean, rstd = ops.group_norm_silu_forward(x, skip, 2, *parameters, 1e-5, True)
    torch.library.opcheck(ops.group_norm_silu_backward, (y, x, skip, mean, rstd, 2, *parameters, True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks(backend):
    module = GroupNormSiLU(4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (x, *_), skip = two_inputs(2, 5, 3, (4, 3))
    with use_backend(backend):
        eager, result = (
            result_and_gradients(lambda x, s, f=function: f(x, skip=s), (x, skip), torch.ones(2, 8, 4, 3))
            for function in (module, compiled)
        )
    torch.testing.assert_close(result, eager)
