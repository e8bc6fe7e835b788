"""At every shape that a model of the zoo uses, the kernels err at most twice as much as PyTorch in the same dtype.

Without a GPU each call is thinned: its kernels see fewer groups, heads or positions of the same kind. Whole calls, and
bfloat16, which the interpreter rounds wrongly, are in `test_on_gpu`.
"""

import math

import pytest
import torch

from tests.kernels import calls
from tests.kernels.accuracy import inaccuracies
from tests.kernels.calls import EVERY_OP
from tests.kernels.zoo_calls import describe, thinned, zoo_calls

OPS = (calls.group_norm, calls.self_cross, calls.temporal, calls.multires_noise, calls.multires_loss)


def is_heavy(maker) -> bool:
    """Whether the call takes the interpreter more than a few seconds."""
    if maker.func is calls.self_cross:
        _, tokens, *_ = maker.args
        return tokens > 256
    rows, channels, *sizes = maker.args
    channels += maker.keywords.get("skip", 0)
    return maker.func is not calls.temporal and rows * channels * math.prod(sizes) > 2**17


def thin_calls(op) -> list:
    """Each once, though several models or several calls of one may be alike but for what was thinned."""
    makers = [thinned(maker) for maker in zoo_calls().values() if maker.func is op]
    return list({describe(maker): maker for maker in makers}.values())


def check(makers: list, dtype: torch.dtype) -> None:
    faults = {describe(maker): inaccuracies(maker().to(dtype)) for maker in makers}
    assert not any(faults.values()), "\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_float32_errs_at_most_twice_as_much_as_pytorch(op):
    makers = [maker for maker in thin_calls(op) if not is_heavy(maker)]
    assert makers
    check(makers, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_float16_errs_at_most_twice_as_much_as_pytorch(op):
    check(thin_calls(op), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op is not calls.temporal], ids=lambda op: op.__name__)
def test_float32_of_large_maps_errs_at_most_twice_as_much_as_pytorch(op):
    check([maker for maker in thin_calls(op) if is_heavy(maker)], torch.float32)


@pytest.mark.parametrize("name", EVERY_OP)
def test_odd_sizes_err_in_float32_at_most_twice_as_much_as_pytorch(name):
    """As `test_on_gpu` asks in every dtype; here of the emulated functions of a GPU."""
    assert not inaccuracies(EVERY_OP[name]())
