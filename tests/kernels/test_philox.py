"""The kernels' random words bit for bit, and their logarithm, sine and cosine at every argument that they can get."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mdm_kernels.multires import philox_kernels as philox
from mdm_kernels.multires import reference

WORDS = 2**24  # a word's upper 24 bits count
BLOCK = 2**20 if torch.get_default_device().type == "cpu" else 1024  # compiled for so many, a kernel takes minutes


@triton.jit
def run_philox(out_ptr, c0, c1, c2, c3, k0, k1):
    one = tl.full((1,), 1, tl.uint32)
    words = philox.philox_4x32(
        one * c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    )
    for i in tl.static_range(4):
        tl.store(out_ptr + i + tl.arange(0, 1), words[i].to(tl.int64))


@triton.jit
def run_minus_two_log(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, philox.minus_two_log(tl.load(bits_ptr + i).to(tl.uint32)))


@triton.jit
def run_box_muller(bits0_ptr, bits1_ptr, cosine_ptr, sine_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits0, bits1 = tl.load(bits0_ptr + i).to(tl.uint32), tl.load(bits1_ptr + i).to(tl.uint32)
    cosine, sine = philox.box_muller(bits0, bits1)
    tl.store(cosine_ptr + i, cosine)
    tl.store(sine_ptr + i, sine)


def every_word(low_bits: int) -> Tensor:
    """int64; `low_bits` are the 8 bits that must not count."""
    return (torch.arange(WORDS) << 8) + low_bits


def box_muller(bits0: Tensor, bits1: Tensor) -> tuple[Tensor, Tensor]:
    cosine, sine = torch.empty(len(bits0)), torch.empty(len(bits0))
    run_box_muller[(len(bits0) // BLOCK,)](bits0, bits1, cosine, sine, BLOCK=BLOCK)
    return cosine, sine


@pytest.mark.parametrize(
    ("counter", "key"),
    [
        ((0, 0, 0, 0), (0, 0)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
    ],
)
def test_words_are_those_of_the_reference(counter, key):
    out = torch.empty(4, dtype=torch.int64)
    run_philox[(1,)](out, *(word - 2**32 if word >= 2**31 else word for word in (*counter, *key)))
    exact = reference.philox_4x32(tuple(torch.tensor(word) for word in counter), key)
    assert out.tolist() == [int(word) for word in exact]


def test_the_radius_is_exact_to_a_unit_in_the_last_place_everywhere():
    """Of itself, not of 1: near u = 1 the logarithm is as small as 1e-7."""
    words, out = every_word(0xA5), torch.empty(WORDS)
    run_minus_two_log[(WORDS // BLOCK,)](words, out, BLOCK=BLOCK)
    exact = ((torch.arange(WORDS) + 1).double() / WORDS).log() * -2
    assert out[-1] == 0  # u = 1
    out, exact = out[:-1].double().sqrt(), exact[:-1].sqrt()
    assert ((out - exact) / exact).abs().max() < torch.finfo(torch.float32).eps


def test_cosine_and_sine_are_exact_to_four_units_in_the_last_place_below_1_at_every_angle():
    """A unit there is half of float32's eps, and one of them is the radius's, whose root a GPU approximates; plain
    PyTorch, which rounds the angle, misses by seven."""
    words = every_word(0xFF)
    unit = torch.full_like(words, math.floor(2**32 * math.exp(-0.5)))  # radius 1, nearly
    cosine, sine = box_muller(unit, words)
    radius = math.sqrt(-2 * math.log(((int(unit[0]) >> 8) + 1) / WORDS))
    angle = (words >> 8).double() * (2 * math.pi / WORDS)
    bound = 4 * torch.finfo(torch.float32).eps / 2
    assert (cosine.double() - radius * angle.cos()).abs().max() < bound
    assert (sine.double() - radius * angle.sin()).abs().max() < bound


def test_normals_match_the_reference_in_float64():
    bits0, bits1 = torch.randint(2**32, (2, 2**20))
    for normal, exact in zip(box_muller(bits0, bits1), reference.box_muller(bits0, bits1, torch.float64), strict=True):
        assert (normal.double() - exact).abs().max() < 6 * 3 * torch.finfo(torch.float32).eps  # normals reach 5.77


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """The vectors published with Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    word = torch.tensor([counter])
    assert tuple(int(out) for out in reference.philox_4x32((word,) * 4, (key, key))) == words
