"""Tensors of more than 2³¹ elements, where an offset in 32 bits would wrap: the last row, which lies beyond, is right.

Each test takes up to 40 GB of a GPU, so that they run one after the other.
"""

import math

import pytest
import torch
from torch import Tensor

import mdm_kernels as mk

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("memory")]

ELEMENTS = 2**31
TOLERANCE = 2.0**-5  # of the largest element: a few roundings to bfloat16, where a wrong offset gives unrelated numbers


def random(*shape: int, channels_last=False, rows=0) -> Tensor:
    """bfloat16 (rows, *shape) normally distributed; by default of just so many rows that it passes ELEMENTS."""
    rows = rows or ELEMENTS // math.prod(shape) + 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(rows, *shape, dtype=torch.bfloat16, memory_format=memory_format).normal_()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def last(x: Tensor, rows: int) -> Tensor:
    return x[-rows:].detach().clone()


def check(function, *inputs: Tensor, rows: int = 1) -> None:
    """`function` treats rows alike: of results and gradients the last `rows` are those of the last inputs alone.

    The result itself serves as its upstream gradient.
    """
    leaves = [x.requires_grad_() for x in inputs]
    with mk.use_backend("triton"):
        result = function(*leaves)
        upstream = result.detach()
        gradients = torch.autograd.grad(result, leaves, upstream)
    alone = [last(x, rows).requires_grad_() for x in inputs]
    expected = function(*alone)
    assert_near(last(result, rows), expected.detach())
    expected_gradients = torch.autograd.grad(expected, alone, last(upstream, rows))
    for gradient, of_alone in zip(gradients, expected_gradients, strict=True):
        assert_near(last(gradient, rows), of_alone)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(512, 32, 32), (64, 1024, 1024)], ids=["whole groups", "tiles"])
def test_group_norm(size, channels_last):
    check(lambda x: mk.group_norm_silu(x, 32), random(*size, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_of_one_map(channels_last):
    """The last group, alone, is the whole of its own map."""
    side = math.isqrt(ELEMENTS // 4) + 1
    x = random(4, side, side, channels_last=channels_last, rows=1).requires_grad_()
    with mk.use_backend("triton"):
        y = mk.group_norm_silu(x, 4)
        (dx,) = torch.autograd.grad(y, x, y.detach())
    alone = x[:, 3:].detach().clone().requires_grad_()
    expected = mk.group_norm_silu(alone, 1)
    (expected_dx,) = torch.autograd.grad(expected, alone, y[:, 3:].detach())
    corner = (..., slice(-1000, None), slice(-1000, None))
    assert_near(y[:, 3:][corner], expected[corner])
    assert_near(dx[:, 3:][corner], expected_dx[corner])


def test_group_norm_with_a_skip():
    x = random(64, 256, 256, channels_last=True)
    check(lambda x, skip: mk.group_norm_silu(x, 32, skip=skip), x, x.detach().clone())


def test_flash_attention():
    q = random(8, 256, 64)
    check(mk.flash_attention, q, q.detach().neg(), q.detach().clone(), rows=2)


def test_self_cross_attention():
    qkv = random(256, 3 * 8 * 96)
    context = torch.randn(len(qkv), 32, 2 * 8 * 96, dtype=torch.bfloat16)
    check(lambda qkv, context: mk.self_cross_attention(qkv, context, num_heads=8), qkv, context, rows=2)


def test_temporal_attention():
    frames = 16
    clips = ELEMENTS // (frames * 1024 * 768) + 1
    qkv = random(1024, 768, rows=clips * frames)
    check(lambda qkv: mk.temporal_attention(qkv, num_heads=8, frames=frames), qkv, rows=frames)


@pytest.mark.parametrize("channels_last", [False, True])
def test_multires_noise_and_loss(channels_last):
    """With the noise given, the last samples are those of a batch of their own; a seed's noise is the same to both."""
    images = random(3, 1024, 1024, channels_last=channels_last)
    strides, alpha_bars = [1, 4], torch.full((2, len(images)), 0.5)
    with mk.use_backend("triton"):
        noise = mk.multires_noise(torch.zeros_like(images), torch.zeros_like(alpha_bars), strides, seed=3)
        x_t = mk.multires_noise(images, alpha_bars, strides, noise)
        expected = mk.multires_noise(last(images, 2), alpha_bars[:, -2:], strides, [last(eps, 2) for eps in noise])
        for level, of_alone in zip(x_t, expected, strict=True):
            assert_near(last(level, 2), of_alone)
        del x_t
        exact = mk.multires_loss(noise, images, alpha_bars, strides, seed=3, prediction="eps")
        assert exact.max() < 1e-4  # the noise rounded to bfloat16 is all that it errs by
        preds = [torch.zeros_like(eps).requires_grad_() for eps in noise]
        gradients = torch.autograd.grad(mk.multires_loss(preds, images, alpha_bars, strides, noise).sum(), preds)
    alone = [last(pred, 2).requires_grad_() for pred in preds]
    arguments = last(images, 2), alpha_bars[:, -2:], strides, [last(eps, 2) for eps in noise]
    expected = torch.autograd.grad(mk.multires_loss(alone, *arguments).sum(), alone)
    for gradient, of_alone in zip(gradients, expected, strict=True):
        assert_near(last(gradient, 2), of_alone)
