"""The yardstick of the attention tests: Triton, and plain PyTorch in the same dtype, against float64."""

import torch
from torch import Tensor

from mdm_kernels import backend, flash_attention, self_cross_attention
from tests.kernels.accuracy import ROUGHNESS, WAYS, nearby


def value_and_gradients(attention, tensors, grad: Tensor, **options) -> list[Tensor]:
    """The output of `attention(*tensors, **options)`, then the gradient of each tensor under the upstream `grad`."""
    out = attention(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def uncancelled(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None):
    """What is left of dq and dk where sums that cancel are each rounded by themselves: (dq, dk), float64 inputs.

    A logit's gradient is p (grad · v − grad · out), a difference of two sums that are equal where a query has one key.
    Each of their terms may err by ROUGHNESS, in ways of its own, so that a sum errs by the root of its terms' squares;
    p passes the error on to dq, by the keys, and to dk, by the queries.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = scale * q @ k.mT
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    p = logits.softmax(-1)
    first = (grad.square() @ v.square().mT).sqrt()  # of grad · v, by query and key
    second = (grad * (p @ v)).square().sum(-1, keepdim=True).sqrt()  # of grad · out, the same for all keys of a query
    dq = ((p * first).square() @ k.square()).sqrt() + second * (p @ k).abs()
    dk = ((p * (first + second)).square().mT @ q.square()).sqrt()
    return ROUGHNESS * scale * dq, ROUGHNESS * scale * dk


def left_of(attention, grad: Tensor, inputs: list[Tensor], options: dict) -> list[float]:
    """The largest of what is `uncancelled` in the output, which is 0, and in the gradient of each input, in float64."""

    def largest(x: Tensor) -> float:
        return x.nan_to_num().max().item() if x.numel() else 0.0  # NaN: of a row with no key

    def heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, options["num_heads"], -1)).permute(2, 0, 3, 1, 4).unbind(0)

    left = [0.0] * (1 + len(inputs))
    if not grad.numel():
        return left
    if attention is flash_attention:
        dq, dk = uncancelled(grad, *inputs, options.get("key_mask"), options.get("scale"))
        left[1:3] = largest(dq), largest(dk)
    elif attention is self_cross_attention:
        (grad,), (q, k, v) = heads(grad, 1), heads(inputs[0], 3)
        dq, dk = uncancelled(grad, q, k, v, None, None)
        for context in inputs[1:]:
            context_dq, context_dk = uncancelled(grad, q, *heads(context, 2), options.get("key_mask"), None)
            dq, left[2] = dq + context_dq.nan_to_num(), largest(context_dk)
        left[1] = max(largest(dq), largest(dk))
    return left


def assert_as_exact(attention, *tensors: Tensor, **options) -> list[Tensor]:
    """Triton's error against float64 is at most twice plain PyTorch's in the same dtype, eight units of the dtype, and
    four times what `nearby` inputs change: much where large logits meet an exponential, and the keys of a query share
    the error of its log-sum-exp. Of flash_attention and self_cross_attention, four times what is `uncancelled`, too:
    with one key dq and dk are 0 whatever the inputs, and PyTorch's error is as small or large as chance has it.

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
    left = left_of(attention, grad.double(), [x.detach() for x in exact_leaves], options)
    with backend.use_backend("triton"):
        actual = value_and_gradients(attention, leaves, grad, **options)
    for i, (a, p, e, rest, *moves) in enumerate(zip(actual, plain, exact, left, *moved, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype), f"result {i}"
        if e.numel():
            unit = torch.finfo(a.dtype).eps * max(1.0, e.abs().max().item())
            change = max((m - e).abs().max().item() for m in moves)
            tolerance = 2 * (p - e).abs().max().item() + 8 * unit + 4 * (change + rest)
            torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}")
    return actual
