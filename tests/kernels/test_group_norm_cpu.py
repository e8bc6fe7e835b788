"""group_norm_silu on CPU tensors, which neither torch's group norm nor a kernel computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_kernels import group_norm_silu
from mdm_kernels.group_norm import cpu
from tests.kernels.group_norm_accuracy import definition, inputs, result_and_gradients


def formatted(x, channels_last):
    return x.to(memory_format=torch.channels_last) if channels_last else x


def assert_near_the_definition(tensors, num_groups, activation="silu"):
    """y and all gradients err at most twice as much as float32 sums of the definition, by the last bit, and by that of
    the terms of dx, which cancel each other where a group has few values, and of a parameter's gradient, whose
    roundings walk at random, in a sum over x and in one of as many means: the one sum by which it is judged may be
    right by chance. Where torch's operations run, they hand each other terms in x's dtype."""

    def ours(x, weight, bias, scale, shift):
        return group_norm_silu(x, num_groups, weight, bias, scale=scale, shift=shift, activation=activation)

    def plain(x, weight, bias, scale, shift):
        return definition(x, num_groups, weight, bias, scale, shift, activation)

    dy = torch.randn_like(tensors[0])
    by_torch = not cpu.pays(tensors[0].detach().requires_grad_())
    term_bit = torch.finfo(tensors[0].dtype if by_torch else torch.float32).eps
    found = result_and_gradients(ours, tensors, dy)
    exact = result_and_gradients(plain, tensors, dy, torch.float64)
    in_float32 = result_and_gradients(plain, tensors, dy, torch.float32)
    terms = [truth.abs().max() + 1 for truth in exact]
    terms[1] += dx_terms(tensors, num_groups, dy)
    sizes = zip(terms[2:], walks(tensors, num_groups, activation, dy), strict=True)
    terms[2:] = [size + 2 * walk for size, walk in sizes]
    for value, truth, yardstick, size in zip(found, exact, in_float32, terms, strict=True):
        last_bit = torch.finfo(value.dtype).eps * (truth.abs().max() + 1)
        assert (value - truth).abs().max() <= 2 * (yardstick - truth).abs().max() + 2 * term_bit * size + last_bit


def dx_terms(tensors, num_groups, dy):
    """Bound of dy·gain / standard deviation."""
    x, weight, _, scale, _ = (None if tensor is None else tensor.double().abs() for tensor in tensors)
    rstd = (tensors[0].double().reshape(len(x), num_groups, -1).var(-1, correction=0) + 1e-5).rsqrt()
    gain = (1 if weight is None else weight.max()) * (1 if scale is None else 1 + scale.max())
    return 1.1 * gain * dy.double().abs().max() * rstd.max()


def walks(tensors, num_groups, activation, dy):
    """The roots of the sums of squares of the terms that each parameter's gradient is a sum of, in the channel that has
    the largest."""
    x, *parameters = (None if tensor is None else tensor.double() for tensor in tensors)
    rows = [None if each is None else each.reshape(-1, x.shape[1]) for each in parameters]
    single = [None if each is None else each.repeat_interleave(len(x) // len(each), 0)[..., None] for each in rows]
    xhat = definition(x, num_groups, None, None, None, None, activation=None).flatten(2)
    leaves = [None if each is None else each.expand_as(xhat).clone().requires_grad_() for each in single]
    weight, bias, scale, shift = leaves
    u = xhat if weight is None else xhat * weight + bias
    u = u if scale is None else u * (1 + scale) + shift
    y = F.silu(u) if activation == "silu" else u
    each_term = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.double().flatten(2))
    return [terms.square().sum((0, 2)).sqrt().max() for terms in each_term]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    channels=st.integers(1, 5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    frames=st.sampled_from([0, 1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
    small=st.sampled_from([0, 2**16]),
    chunk=st.sampled_from([1, 200, 2**19]),
    activation=st.sampled_from(["silu", None]),
)
def test_any_rows_in_any_chunks(rows, groups, channels, size, frames, dtype, channels_last, small, chunk, activation):
    torch.manual_seed(0)
    film = rows if frames else None
    x, *parameters = inputs((rows * max(frames, 1), groups * channels, *size), film_rows=film, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SMALL", small)
        patch.setattr(cpu, "CHUNK", chunk)
        assert_near_the_definition((formatted(x, channels_last), *parameters), groups, activation)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e4), (torch.float32, 3.0), (torch.bfloat16, 200.0)])
@pytest.mark.parametrize("small", [0, 2**16])
def test_one_row_far_from_zero_beside_one_that_is_not(monkeypatch, dtype, mean, small):
    monkeypatch.setattr(cpu, "SMALL", small)
    x, *parameters = inputs((2, 8, 16, 16), dtype=torch.float32)
    x[1] += mean
    assert_near_the_definition((formatted(x.to(dtype), True), *parameters), 2)


@pytest.mark.parametrize("small", [0, 2**16])
def test_second_derivatives(monkeypatch, small):
    monkeypatch.setattr(cpu, "SMALL", small)
    tensors = [each.requires_grad_() for each in inputs((2, 4, 3, 2), film_rows=2, dtype=torch.float64)]

    def call(x, weight, bias, scale, shift):
        return group_norm_silu(formatted(x, True), 2, weight, bias, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(lambda x: call(x, None, None, None, None), tensors[:1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_to_be_differentiated_is_the_same_where_scale_and_shift_follow_from_x(channels_last):
    (x, *_), seen = inputs((2, 4, 3, 2), dtype=torch.float64), []
    x = formatted(x, channels_last).requires_grad_()
    x.register_hook(lambda gradient: seen.append(gradient))
    loss = group_norm_silu(x, 2, scale=x.mean((2, 3)), shift=x.amax((2, 3))).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert len(seen) == 2  # one hook call a gradient, none of what the derivative does inside


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_several_results_in_one_call(channels_last):
    x, weight, *_ = inputs((2, 4, 3, 2), dtype=torch.float64)

    def call(x, weight):
        return group_norm_silu(formatted(x, channels_last), 2, weight).sum((2, 3))

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(call, (x, weight), vectorize=True), jacobian(call, (x, weight)))


def test_rows_without_positions():
    """(N, C), a vector for each sample, as of one position."""
    (x, *parameters), dy = inputs((6, 8, 1), film_rows=2), torch.randn(6, 8)

    def call(x, weight, bias, scale, shift):
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)

    found = result_and_gradients(call, (x[..., 0], *parameters), dy)
    expected = result_and_gradients(call, (x, *parameters), dy[..., None])
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted.view_as(value))


def test_what_it_is_for():
    def pays(channels_last, shape, requires_grad=True, **options):
        weight = torch.zeros(shape[1], requires_grad=requires_grad)
        return cpu.pays(formatted(torch.zeros(shape, **options), channels_last), None, weight)

    large, small = (2, 8, 128, 128), (2, 8, 16, 16)
    for channels_last, shape in itertools.product([False, True], [large, small]):
        assert pays(channels_last, shape) == (channels_last or shape is small)
        assert not pays(channels_last, shape, device="meta")
        assert not pays(channels_last, shape, requires_grad=False)
        with torch.no_grad():
            assert not pays(channels_last, shape)
    assert not pays(True, (0, 8, 16, 16))
    assert not pays(True, (2, 8, 0, 16))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_second_row_of_a_larger_x(channels_last):
    tensors = [each.requires_grad_() for each in inputs((4, 6, 5, 7), film_rows=2)]

    def call(x, weight, bias, scale, shift):
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)

    def every_second(x):
        return formatted(x, channels_last)[::2, :, 1:]

    ours = call(every_second(tensors[0]), *tensors[1:])
    dense = call(every_second(tensors[0]).clone(), *tensors[1:])
    dy = torch.randn(dense.shape)
    for found, expected in zip(
        (ours, *torch.autograd.grad(ours, tensors, dy)), (dense, *torch.autograd.grad(dense, tensors, dy)), strict=True
    ):
        assert torch.equal(found, expected)
