"""How far a Triton result may be from the float64 one: no further than twice as far as PyTorch's in the same dtype."""

import torch
from torch import Tensor

from tests.kernels.calls import Call


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def inaccuracies(call: Call) -> list[str]:
    """What is too far from float64 in the results and gradients of `call`: root mean square and largest errors.

    A correctly rounded result errs by a quarter of a unit of its dtype, so less is never asked. Of few numbers
    PyTorch's may be exact by chance, and the sums that gradients of weights are may nearly cancel: they get some units
    more.
    """
    exact = call.to(torch.float64).run("torch")
    plain = call.run("torch")
    actual = call.run("triton")
    faults = []
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype), f"result {i}"
        unit = torch.finfo(a.dtype).eps
        ours, theirs = a.double() - e, p.double() - e
        few = 16 / e.numel() ** 0.5
        for kind, size, units in (("root mean square", root_mean_square, 0.25), ("largest", largest, 2)):
            allowed = max(2 * size(theirs), (units + few) * unit * size(e))
            if not size(ours) <= allowed:
                faults.append(f"result {i}: {kind} error {size(ours):.2e}, PyTorch's {size(theirs):.2e}")
    return faults
