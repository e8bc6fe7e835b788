"""Shapes that the kernels have not: the references compute them, on every backend."""

import pytest
import torch

from mdm_kernels import backend, flash_attention, multires_noise, self_cross_attention, temporal_attention
from mdm_kernels.multires import launch


@pytest.fixture
def launches():
    """What is launched while the backend is "triton"."""
    launched = []
    with backend.use_backend("triton"), backend.recording(lambda kernel, arguments: launched.append(kernel)):
        yield launched


def attention_calls(width: int) -> dict:
    heads = torch.randn(1, 2, 5, width)
    qkv, context = torch.randn(4, 5, 3 * width), torch.randn(4, 6, 2 * width)
    return {
        "flash_attention": lambda: flash_attention(heads, heads, heads),
        "self_cross_attention": lambda: self_cross_attention(qkv, context, num_heads=1),
        "temporal_attention": lambda: temporal_attention(qkv, num_heads=1, frames=2),
    }


@pytest.mark.parametrize("name", attention_calls(1))
def test_heads_wider_than_128_are_left_to_the_reference(name, launches):
    wide = attention_calls(129)[name]
    result = wide()
    assert not launches
    with backend.use_backend("torch"):
        assert torch.equal(result, wide())
    attention_calls(128)[name]()
    assert launches


def test_a_frame_of_2_to_the_31_elements_is_left_to_the_reference(launches):
    height = 2**15
    for width, fits in ((2**16 // 3, True), (2**16 // 3 + 1, False)):
        images = torch.empty(1, 3, height, width, dtype=torch.bfloat16, device="meta")
        assert launch.fits(images) == fits
        launches.clear()
        multires_noise(images, torch.empty(1, 1, device="meta"), [1], seed=1)
        assert bool(launches) == fits


def test_many_frames_of_a_clip_may_pass_2_to_the_31_elements(launches):
    images = torch.empty(1, 3, 64, 4096, 4096, dtype=torch.bfloat16, device="meta")
    multires_noise(images, torch.empty(1, 1, device="meta"), [1], seed=1)
    assert launches
