"""The yardstick of the attention tests: Triton, and plain PyTorch in the same dtype, against float64."""

import torch
from torch import Tensor

from mdm_kernels import backend
from tests.kernels.accuracy import WAYS, nearby


def value_and_gradients(attention, tensors, grad: Tensor, **options) -> list[Tensor]:
    """The output of `attention(*tensors, **options)`, then the gradient of each tensor under the upstream `grad`."""
    out = attention(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def assert_as_exact(attention, *tensors: Tensor, **options) -> list[Tensor]:
    """Triton's error against float64 is at most twice plain PyTorch's in the same dtype, eight units of the dtype, and
    four times what `nearby` inputs change: much where large logits meet an exponential, and the keys of a query share
    the error of its log-sum-exp.

    Checks the output and the gradient of every tensor; returns what Triton computed.
    """
    leaves = [x.detach().requires_grad_() for x in tensors]
    exact_leaves = [x.detach().double().requires_grad_() for x in tensors]
    with backend.use_backend("torch"):
        grad = torch.randn_like(attention(*leaves, **options))
        plain = value_and_gradients(attention, leaves, grad, **options)
        exact = value_and_gradients(attention, exact_leaves, grad, **options)
        moved = [
            value_and_gradients(
                attention, [nearby(x.detach(), way=way).requires_grad_() for x in exact_leaves], grad, **options
            )
            for way in WAYS
        ]
    with backend.use_backend("triton"):
        actual = value_and_gradients(attention, leaves, grad, **options)
    for i, (a, p, e, *moves) in enumerate(zip(actual, plain, exact, *moved, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype), f"result {i}"
        if e.numel():
            unit = torch.finfo(a.dtype).eps * max(1.0, e.abs().max().item())
            change = max((m - e).abs().max().item() for m in moves)
            tolerance = 2 * (p - e).abs().max().item() + 8 * unit + 4 * change
            torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}")
    return actual
