"""group_norm_silu: the Triton kernels, interpreted, and the CPU path against the definition in float64."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mdm_kernels import GroupNormSiLU, group_norm_silu, tiles, tune
from mdm_kernels.accelerate.fused import norm_silu
from mdm_kernels.backend import recording, use_backend
from mdm_kernels.group_norm import launch
from tests.kernels.group_norm_accuracy import check, definition, inputs, result_and_gradients, triton
from tests.kernels.group_norm_paths import PATHS


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 3),
    num_groups=st.integers(1, 4),
    width=st.integers(1, 7),
    height_width=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
    affine=st.booleans(),
    film=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_triton_computes_the_definition(
    path, rows, num_groups, width, height_width, channels_last, affine, film, activation
):
    shape = (rows, num_groups * width, *height_width)
    x, *parameters = inputs(shape, affine=affine, film_rows=rows if film else None)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if x[0].numel() // num_groups > 2:  # a group of two is ±1 whatever it holds: its gradient is all rounding
        check((x, *parameters), num_groups, activation, path)


def test_each_path_runs_kernels_of_its_own():
    """Were it otherwise, the tests of one path would pass without having run it."""
    launched = {}
    for path in PATHS:
        names = launched[path] = set()
        with triton(path), recording(lambda kernel, *_, names=names: names.add(kernel.fn.__name__)):
            result_and_gradients(lambda x: group_norm_silu(x, 4), [torch.ones(2, 8, 4, 4)], torch.ones(2, 8, 4, 4))
    assert launched["held group"] == {"held_group_forward", "held_group_backward"}
    assert launched["walked group"] == {"group_forward", "group_backward"}
    assert launched["tiles"] == {
        *("tile_statistics", "combine_statistics", "apply_forward"),
        *("tile_gradient_sums", "combine_gradient_sums", "apply_backward"),
    }
    assert launched["one pass"] == {"one_pass_forward", "one_pass_backward"}


@pytest.mark.parametrize("path", ["held group", "walked group"])
@pytest.mark.parametrize(("channels", "size"), [(256, 12), (96, 5)])
def test_whatever_tile_the_tuner_may_choose_computes_the_definition(channels, size, path):
    x, *parameters = inputs((1, channels, size, size), film_rows=1)
    x = x.contiguous(memory_format=torch.channels_last)
    problem = launch.Problem.of(x, None, tune.GROUPS, *parameters)
    for candidate in tune.group_norm_candidates(channels, size**2, x.itemsize):
        keys = (launch.tile_key(direction, problem) for direction in ("forward", "backward"))
        with contextlib.ExitStack() as tuned:
            for key in keys:
                tuned.enter_context(tiles.trying(key, candidate))
            check((x, *parameters), tune.GROUPS, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_channels_last_tiles_of_128_channels(path):
    x, *parameters = inputs((1, 256, 5, 9), film_rows=1)
    check((x.contiguous(memory_format=torch.channels_last), *parameters), 16, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_larger_than_a_block(path, channels_last):
    x, *parameters = inputs((1, 6, 75, 70), film_rows=1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check((x, *parameters), 2, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_of_scale_serves_consecutive_frames(path):
    check(inputs((6, 8, 5, 3), film_rows=2), 4, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(path, dtype):
    check(inputs((2, 12, 6, 7), film_rows=2, dtype=dtype), 3, path=path)


def test_float32_parameters_of_a_half_precision_x():
    tensors = inputs((2, 8, 4, 4), dtype=torch.float16, parameter_dtype=torch.float32)

    def ours(x, weight, bias, scale, shift):
        return group_norm_silu(x, 4, weight, bias)

    dy = torch.randn_like(tensors[0])
    with triton():
        results = result_and_gradients(ours, tensors, dy)
    assert [r.dtype for r in results] == [torch.float16, torch.float16, torch.float32, torch.float32]
    exact = result_and_gradients(lambda *t: definition(t[0], 4, *t[1:]), tensors, dy, torch.float64)
    torch.testing.assert_close(results[2:], [e.float() for e in exact[2:]], rtol=1e-5, atol=1e-5)


def test_any_one_parameter_alone():
    x, *parameters = inputs((2, 6, 4, 5), film_rows=2)
    for kept in range(4):
        check((x, *(p if i == kept else None for i, p in enumerate(parameters))), 3)


def error_far_from_zero(channels_last, std=0.1, dtype=torch.float32):
    """Largest errors at 10000 ± std: of group_norm_silu, and of two passes in float32."""
    x, *parameters = inputs((2, 64, 16, 16), mean=10000.0, std=std, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    exact = definition(x.double(), 32, *parameters)
    ideal = definition(x.float(), 32, *parameters)
    y = group_norm_silu(x, 32, *parameters[:2])
    return (y - exact).abs().max(), (ideal - exact).abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_no_cancellation_far_from_zero(path, channels_last):
    with triton(path):
        error, ideal = error_far_from_zero(channels_last)
    assert error <= 2 * ideal


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_cancellation_far_from_zero_on_cpu(channels_last):
    error, ideal = error_far_from_zero(channels_last)
    assert error <= 2 * ideal


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_cancellation_in_half_precision_on_cpu(channels_last):
    error, _ = error_far_from_zero(channels_last, std=20.0, dtype=torch.float16)
    assert error <= 0.01  # 2 ulp of results around 5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (10000.0, 0.1)])
def test_large_channels_last_groups_do_not_lose_digits_on_cpu(mean, std):
    """Where torch's group norm, with one running total a group, errs by 3e-5 of the result, and by 2e-4 at 1024²."""
    x = (mean + std * torch.randn(1, 32, 512, 512)).to(memory_format=torch.channels_last)
    with use_backend("torch"):
        result = group_norm_silu(x, 32, activation=None)
        expected = group_norm_silu(x.double(), 32, activation=None)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result - expected).norm() <= 1e-6 * expected.norm()


def test_gradients_of_large_channels_last_groups_on_cpu():
    x = torch.randn(1, 4, 160, 208, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    with use_backend("torch"):
        ours = torch.autograd.grad(group_norm_silu(x, 1, weight, bias), (x, weight, bias), dy)
    theirs = torch.autograd.grad(F.silu(F.group_norm(x, 1, weight, bias)), (x, weight, bias), dy)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_gradient_far_from_zero(path):
    check(inputs((2, 8, 8, 8), mean=10000.0, std=0.1), 4, path=path)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 8, 3, 5), torch.contiguous_format),
        ((2, 8, 3, 5), torch.channels_last),
        ((2, 8, 2, 3, 5), torch.channels_last_3d),
    ],
)
def test_result_keeps_the_memory_format(backend, shape, memory_format):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    with use_backend(backend):
        y = group_norm_silu(x, 4)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 2:8],
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 2:8],
        lambda x: x[:, :, :, :1].expand(-1, -1, -1, 3),
    ],
    ids=["rows", "channels", "transposed", "channels of channels-last", "expanded"],
)
def test_strides_do_not_change_the_result(path, view):
    x = view(torch.randn(2, 12, 6, 6))
    with triton(path):
        torch.testing.assert_close(group_norm_silu(x, 3), group_norm_silu(x.contiguous(), 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dy_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_in_another_memory_format(x_format, dy_format):
    x = torch.randn(2, 8, 4, 5).contiguous(memory_format=x_format).requires_grad_()
    dy = torch.randn(2, 8, 4, 5).contiguous(memory_format=dy_format)
    with triton():
        (dx,) = torch.autograd.grad(group_norm_silu(x, 4), x, dy)
    (exact,) = torch.autograd.grad(group_norm_silu(x.double(), 4), x, dy.double())
    torch.testing.assert_close(dx, exact, rtol=1e-5, atol=1e-5)


def test_scale_and_shift_may_be_views_of_one_projection():
    x, projection = torch.randn(2, 8, 3, 3), torch.randn(2, 16)
    scale, shift = projection.chunk(2, dim=1)
    with triton():
        y = group_norm_silu(x, 4, scale=scale, shift=shift)
        torch.testing.assert_close(y, group_norm_silu(x, 4, scale=scale.contiguous(), shift=shift.contiguous()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_input_has_zero_gradients(backend, shape):
    tensors = inputs(shape, film_rows=2)
    with use_backend(backend):
        y, *gradients = result_and_gradients(
            lambda x, w, b, s, t: group_norm_silu(x, 4, w, b, scale=s, shift=t), tensors, torch.zeros(shape)
        )
    assert y.shape == shape
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
    assert all((g == 0).all() for g in gradients)


def test_module_is_a_group_norm():
    plain, fused = nn.GroupNorm(4, 8), GroupNormSiLU(4, 8)
    nn.init.normal_(plain.weight)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fused(x), F.silu(plain(x)))
    assert isinstance(fused, nn.GroupNorm)


def test_module_modulates():
    module = GroupNormSiLU(4, 8, affine=False, activation=None)
    x, _, _, scale, shift = inputs((2, 8, 5, 5), film_rows=2)
    expected = F.group_norm(x, 4) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(module(x, scale, shift), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [1, 2])
def test_one_value_a_group_is_normalised_to_zero(backend, rows):
    """It is its own mean, so that the bias alone is left; torch's own function refuses one row of such."""
    tensors = inputs((rows, 4, 1, 1))
    with use_backend(backend):
        y, dx, dweight, dbias = result_and_gradients(
            lambda x, weight, bias, *_: group_norm_silu(x, 4, weight, bias), tensors[:3], torch.ones(rows, 4, 1, 1)
        )
    bias = tensors[2].clone().requires_grad_()
    expected = F.silu(bias)
    torch.testing.assert_close(y, expected.detach().view(1, 4, 1, 1).expand(rows, -1, -1, -1))
    torch.testing.assert_close(dbias, rows * torch.autograd.grad(expected.sum(), bias)[0])
    assert dx.abs().max() < 1e-4  # roundings, over the root of eps
    assert not dweight.any()


@pytest.mark.parametrize("skip_channels", [0, 2])
def test_a_module_given_too_few_channels_says_so_of_x(skip_channels):
    x = torch.ones(2, 4, 3, 3)
    skip = torch.ones(2, skip_channels, 3, 3) if skip_channels else None
    with pytest.raises(ValueError, match=rf"has {4 + skip_channels} channels; this norm was made for num_channels = 8"):
        GroupNormSiLU(4, 8)(x, skip=skip)
    with pytest.raises(ValueError, match=r"x \(2, 4, 3, 3\) has 4 channels"):
        norm_silu(GroupNormSiLU(4, 8, activation=None), x)


def test_the_reference_keeps_channels_last_where_torch_answers_contiguous(monkeypatch):
    """As its native CUDA group norm does."""
    native = torch.native_group_norm

    def contiguous(*args):
        y, *statistics = native(*args)
        return y.contiguous(), *statistics

    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    expected = group_norm_silu(x, 2)
    monkeypatch.setattr(torch, "native_group_norm", contiguous)
    y = group_norm_silu(x, 2)
    assert y.stride() == expected.stride() == x.stride()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_keeps_the_dtype(backend):
    x = torch.randn(2, 8, 4, 4)
    with use_backend(backend), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = group_norm_silu(x, 4, torch.ones(8), torch.zeros(8), scale=torch.ones(2, 8))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, definition(x, 4, None, None, torch.ones(2, 8), None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8, 3, 3, dtype=torch.int64)}, TypeError, r"x is torch.int64"),
        ({"x": [1.0]}, TypeError, r"x is list"),
        ({"x": torch.ones(8)}, ValueError, r"x has shape \(8,\); it must be \(N, C"),
        ({"num_groups": 3}, ValueError, r"num_groups is 3; it must divide the 8 channels"),
        ({"num_groups": 0}, ValueError, r"num_groups is 0"),
        ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\); it must be \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, r"bias is torch.int32"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, r"bias is on meta and x on "),
        ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\); it must be \(N / T, 8\)"),
        ({"shift": torch.ones(3, 8)}, ValueError, r"shift has 3 rows; they must divide the 2 rows of x"),
        ({"scale": torch.ones(1, 8), "shift": torch.ones(2, 8)}, ValueError, r"must have one shape"),
        ({"activation": "relu"}, ValueError, r"activation is 'relu'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"x": torch.ones(2, 8, 3, 3), "num_groups": 4} | change
    with pytest.raises(error, match=message):
        group_norm_silu(**arguments)


def test_second_derivatives_raise():
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    with triton():
        (dx,) = torch.autograd.grad(group_norm_silu(x, 4).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dx.sum().backward()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [False, True])
def test_ops_are_registered_correctly(channels_last, film):
    x, *parameters = inputs((1, 4, 3, 2), film_rows=1 if film else None)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.mdm_kernels
    leaves = [tensor if tensor is None else tensor.clone().requires_grad_() for tensor in (x, *parameters)]
    torch.library.opcheck(ops.group_norm_silu_forward, (leaves[0], None, 2, *leaves[1:], 1e-5, True))
    _, mean, rstd = ops.group_norm_silu_forward(x, None, 2, *parameters, 1e-5, True)
    torch.library.opcheck(ops.group_norm_silu_backward, (x, x, None, mean, rstd, 2, *parameters, True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks(backend):
    module = GroupNormSiLU(4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    scale = torch.randn(2, 8)
    with use_backend(backend):
        eager, result = module(x, scale), compiled(x, scale)
        torch.testing.assert_close(result, eager)
        gradients = [torch.autograd.grad(y.sum(), [x, module.weight]) for y in (eager, result)]
    torch.testing.assert_close(*gradients)


def test_meta_tensors_give_shapes():
    y = group_norm_silu(torch.empty(2, 8, 5, 5, dtype=torch.bfloat16, device="meta"), 4)
    assert y.shape == (2, 8, 5, 5)
    assert y.dtype == torch.bfloat16
