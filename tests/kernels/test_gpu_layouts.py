"""Convolutions without memory answer in the memory format of a GPU's."""

import pytest
import torch
import torch.nn.functional as F

from mdm_kernels.aot.gpu_layouts import GPULayouts, is_channels_last_strided
from mdm_kernels.layouts import dense_format

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("x_format", FORMATS)
def test_a_convolution_on_meta_answers_channels_last_where_x_or_the_weight_is(x_format, weight_format):
    x = torch.empty(2, 8, 6, 6, device="meta").to(memory_format=x_format).requires_grad_()
    weight = torch.empty(12, 8, 3, 3, device="meta").to(memory_format=weight_format).requires_grad_()
    with GPULayouts():
        y = F.conv2d(x, weight, torch.empty(12, device="meta"), padding=1)
        gradients = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    last = torch.channels_last in (x_format, weight_format)
    assert {dense_format(out) for out in (y, *gradients)} == {FORMATS[last]}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (4, 8, 3, 3), (1, 8, 1, 4)])
def test_strides_are_told_as_pytorch_tells_them(shape):
    """A CPU convolution follows the same rule."""
    for memory_format in FORMATS:
        x = torch.empty(shape).to(memory_format=memory_format)
        like = torch.empty_like(torch.empty(shape[0], shape[1], 7, 7).to(memory_format=memory_format))
        assert is_channels_last_strided(x) == (dense_format(like) == torch.channels_last)


def test_clips_have_a_format_too():
    x = torch.empty(1, 3, 4, 6, 6, device="meta").to(memory_format=torch.channels_last_3d)
    with GPULayouts():
        y = F.conv3d(x, torch.empty(5, 3, 1, 3, 3, device="meta"))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
