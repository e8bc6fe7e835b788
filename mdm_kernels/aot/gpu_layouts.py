"""Convolutions of tensors without memory that answer in the memory format in which a GPU's would.

cuDNN answers in channels_last where x or the weight is in it. Tensors on the meta device, and in some versions of
PyTorch fake CUDA tensors on a machine without a GPU, answer contiguous: a model run on them would show other launches,
and other copies, than happen.
"""

import torch
from torch import Tensor

from .. import private_torch

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class GPULayouts(private_torch.TorchDispatchMode):
    """A context in which convolutions of 4-D and 5-D tensors answer in the memory format in which cuDNN's do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            return _as_cudnn(out, *args[:2])
        if function is torch.ops.aten.convolution_backward.default:
            gradients = ((gradient, *args[1:3]) for gradient in out[:2])
            return *(
                gradient if gradient is None else _as_cudnn(gradient, *like) for gradient, *like in gradients
            ), out[2]
        return out


def _as_cudnn(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    last = out.dim() in FORMATS and (is_channels_last_strided(x) or is_channels_last_strided(weight))
    return out.contiguous(memory_format=FORMATS[out.dim()]) if last else out


def is_channels_last_strided(x: Tensor) -> bool:
    """Whether the strides of x are a channels-last tensor's, those of dimensions of size 1 too: PyTorch's rule, by
    which a 1×1 convolution's weight has a memory format."""
    least = 0
    for dimension in (1, *reversed(range(2, x.dim())), 0):
        size, stride = x.shape[dimension], x.stride(dimension)
        if size == 0 or stride < least or (dimension == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return x.dim() in FORMATS
