"""The definition of group_norm_silu in float64, and how far the kernels may be from it."""

import contextlib

import torch
import torch.nn.functional as F

from mdm_kernels import group_norm_silu
from mdm_kernels.backend import use_backend
from tests.kernels.accuracy import nearby
from tests.kernels.group_norm_paths import along


@contextlib.contextmanager
def triton(path="held group"):
    """Run the Triton kernels, for groups of any size along one path."""
    with use_backend("triton"), along(path):
        yield


def definition(x, num_groups, weight, bias, scale, shift, activation="silu", eps=1e-5, skip=None):
    """Two passes and nothing clever, in the dtype of x."""
    x = x if skip is None else torch.cat([x, skip], 1)

    def per_channel(parameter):
        parameter = parameter.to(x.dtype).reshape(-1, x.shape[1])
        rows = parameter.repeat_interleave(x.shape[0] // len(parameter), 0)
        return rows.reshape(x.shape[:2] + (1,) * (x.dim() - 2))

    groups = x.reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    y = (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    y = y if weight is None else y * per_channel(weight)
    y = y if bias is None else y + per_channel(bias)
    y = y if scale is None else y * (1 + per_channel(scale))
    y = y if shift is None else y + per_channel(shift)
    return F.silu(y) if activation == "silu" else y


def inputs(
    shape, *, affine=True, film_rows=None, dtype=torch.float32, parameter_dtype=None, mean=0.0, std=1.0, channels=None
):
    """x, weight, bias, scale, shift; the last four for `channels`, by default those of x."""
    x = (mean + std * torch.randn(shape)).to(dtype)
    channels = channels or shape[1]
    weight, bias = torch.randn(2, channels).to(parameter_dtype or dtype) if affine else (None, None)
    scale, shift = torch.randn(2, film_rows, channels).to(dtype) if film_rows else (None, None)
    return x, weight, bias, scale, shift


def result_and_gradients(function, tensors, dy, dtype=None):
    """y and the gradient of every tensor that is not None, with everything cast to dtype."""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def check(tensors, num_groups, activation="silu", path="held group", skip=None):
    """y and all gradients, the skip's among them, err at most twice as much as the definition in the same dtype, the
    rounding of float32 sums and of the result, and twice what `nearby` inputs change."""
    x = tensors[0]
    dy = torch.randn_like(x if skip is None else torch.cat([x, skip], 1))

    def ours(skip, x, weight, bias, scale, shift):
        return group_norm_silu(x, num_groups, weight, bias, skip=skip, scale=scale, shift=shift, activation=activation)

    def plain(skip, x, weight, bias, scale, shift):
        return definition(x, num_groups, weight, bias, scale, shift, activation, skip=skip)

    tensors = (skip, *tensors)
    with triton(path):
        results = result_and_gradients(ours, tensors, dy)
    exact = result_and_gradients(plain, tensors, dy, torch.float64)
    reference = result_and_gradients(plain, tensors, dy)
    x_and_skip = [t if t is None else nearby(t.double(), t.double().mean()) for t in (skip, x)]
    parameters = [t if t is None else nearby(t.double()) for t in tensors[2:]]
    moved = result_and_gradients(plain, (*x_and_skip, *parameters), nearby(dy.double()), torch.float64)
    for ours, same_dtype, truth, near in zip(results, reference, exact, moved, strict=True):
        size, eps = truth.abs().max(), torch.finfo(ours.dtype).eps
        allowed = 2 * (same_dtype - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * (1 + size) + eps * size
        allowed += 2 * (near - truth).abs().max()
        assert (ours - truth).abs().max() <= allowed
