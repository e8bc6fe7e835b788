"""Every kernel's gradient against differences of its own results (torch.autograd.gradcheck), without any reference.

The kernels compute in float32. A step of 2⁻⁶ changes a result by far more than its rounding, some 2⁻²⁰, and the central
difference is off by the third derivative times 2⁻¹⁴: what is left of either is below the tolerance.
"""

import pytest
import torch

from mdm_kernels import use_backend
from tests.kernels import calls
from tests.kernels.calls import Call, mapped, tensors_in
from tests.kernels.group_norm_paths import along

TINY_CALLS = {
    "group_norm": lambda: calls.group_norm(2, 2, 3, 1, groups=1, film_rows=1),
    "group_norm, no activation": lambda: calls.group_norm(1, 4, 3, 1, activation=None, channels_last=False),
    "group_norm, skip": lambda: calls.group_norm(1, 1, 3, 1, skip=3, film_rows=1),
    "flash": lambda: calls.flash(queries=2, keys=3, width=3),
    "self_cross": lambda: calls.self_cross(tokens=2, context=3, width=3),
    "self alone": lambda: calls.self_cross(tokens=3, context=0, width=3, masked=False),
    "temporal": lambda: calls.temporal(frames=3, positions=1, width=2),
    "temporal, rotary": lambda: calls.temporal(frames=3, positions=1, width=2, rotary=True),
    "multires_loss": lambda: calls.multires_loss(2, 1, 4, 2, strides=[1, 2], rows=[1, 2]),
    "multires_loss, clips": lambda: calls.multires_loss(1, 1, 2, 2, 4, strides=[(1, 1), (2, 2)], seed=None),
}


def in_float64(call: Call):
    """The call as a function of its differentiable tensors, all float64 outside, as gradcheck wants them."""

    def function(*leaves):
        remaining = iter(leaves)
        inputs = {name: call.arguments[name] for name in call.differentiable}
        inputs = {name: mapped(lambda _: next(remaining).float(), value) for name, value in inputs.items()}
        return call.function(**call.arguments | inputs).double()

    leaves = [x for name in call.differentiable for x in tensors_in(call.arguments[name])]
    return function, [x.double().requires_grad_() for x in leaves]


def check(call: Call) -> None:
    function, leaves = in_float64(call)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(function, leaves, eps=2.0**-6, atol=2.0**-9, rtol=2.0**-9)


@pytest.mark.parametrize("name", TINY_CALLS)
def test_gradients_are_the_differences_of_results(name):
    check(TINY_CALLS[name]())


@pytest.mark.parametrize("path", ["walked group", "tiles"])
def test_gradients_of_groups_that_are_not_held_are_the_differences_of_results(path):
    with along(path):
        check(TINY_CALLS["group_norm"]())
