"""How far a Triton result may be from the float64 one: no further than twice as far as PyTorch's in the same dtype, or
than the result moves when its inputs move by what a GPU's approximate functions err by (`gpu_functions`)."""

import dataclasses

import torch
from torch import Tensor

from tests.kernels.calls import KEPT_IN_FLOAT32, Call, mapped, upstream_gradient


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def largest(x: Tensor) -> float:
    return x.abs().max().item()


ROUGHNESS = 4 * torch.finfo(torch.float32).eps
"""What an exponential and a quotient, each of two units in the last place, do to a number."""


WAYS = (2.4, 3.7, 5.3)
"""in which inputs are moved: in one of them, a sum of what moved may cancel by chance"""


SIZES = {"root mean square": (root_mean_square, 0.25), "largest": (largest, 2)}
"""How large an error is, in two ways, and the units of its dtype that are always allowed."""


def nearby(x: Tensor, about: Tensor | float = 0.0, way: float = WAYS[0]) -> Tensor:
    """x with each difference from `about` made larger or smaller by ROUGHNESS; x itself if it is no float.

    The signs are those of a cosine of squares, whose sums grow like those of random ones: regular signs would cancel in
    the sums that gradients of weights are, where errors do not.
    """
    if not x.is_floating_point():
        return x
    signs = torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device).square() * way).sign().view(x.shape)
    return x + ROUGHNESS * signs.to(x.dtype) * (x - about)


def inaccuracies(call: Call) -> list[str]:
    """What is too far from float64 in the results and gradients of `call`: root mean square and largest errors.

    How much a result changes with the inputs says what errors of functions cost where sums cancel and where large
    logits meet an exponential. A correctly rounded result errs by a quarter of a unit of its dtype, so less is never
    asked. Of few numbers PyTorch's may be exact by chance, and hardly move by chance, and the sums that gradients of
    weights are may nearly cancel: they get some units more.
    """
    in_float64 = call.to(torch.float64)
    exact = in_float64.run("torch")
    moves = [_moves(in_float64, way, exact) for way in WAYS]
    plain = call.run("torch")
    actual = call.run("triton")
    faults = []
    for i, (a, p, e, *moved) in enumerate(zip(actual, plain, exact, *moves, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype), f"result {i}"
        unit = torch.finfo(a.dtype).eps
        ours, theirs = a.double() - e, p.double() - e
        few = 16 / e.numel() ** 0.5
        for kind, (size, units) in SIZES.items():
            allowed = max(2 * size(theirs), (units + few) * unit * size(e), *(2 * (1 + few) * m[kind] for m in moved))
            if not size(ours) <= allowed:
                faults.append(f"result {i}: {kind} error {size(ours):.2e}, PyTorch's {size(theirs):.2e}")
    return faults


def _moves(call: Call, way: float, exact: list[Tensor]) -> list[dict[str, float]]:
    """How far each of its results moves, in every size, if its inputs, and a gradient of its results, are nearby ones.

    Numbers, not results: those of the largest calls take gigabytes.
    """
    arguments = {
        name: value if name in KEPT_IN_FLOAT32 else mapped(lambda x: nearby(x, way=way), value)
        for name, value in call.arguments.items()
    }
    moved = dataclasses.replace(call, arguments=arguments).run("torch", lambda y: nearby(upstream_gradient(y), way=way))
    differences = (m - e for m, e in zip(moved, exact, strict=True))
    return [{kind: size(difference) for kind, (size, _) in SIZES.items()} for difference in differences]
