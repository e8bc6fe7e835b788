"""Everything of PyTorch that this package uses and PyTorch does not promise to keep, name by name, in one place.

tests/kernels/test_private_torch.py has a test for each name, which says what broke when it fails.
"""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _python_dispatch

SingleLevelFunction = _SingleLevelFunction
"""Base of an autograd.Function that is called below torch.func's interpreters, one level of differentiation at a time.
torch.autograd.Function expects to be called above them, and would ask for a `setup_context` and a `vmap`."""

allowed_under_torch_func = enable_single_level_autograd_function
"""Context in which a SingleLevelFunction may be called while torch.func transforms are active."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which an op called runs its CPU or CUDA kernel and not its Autograd one."""

torch_func_is_active = torch._C._are_functorch_transforms_active
"""() → whether the code runs inside torch.func.grad, vmap, jvp or another transform."""

dispatch_modes = torch._C._len_torch_dispatch_stack
"""() → how many modes see or replace every operator: torch.compile's, FakeTensorMode, a user's TorchDispatchMode."""

compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)
"""What compiled autograd asks a function's context for; only torch.autograd.Function has one."""


TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Base of a context that sees every operator before it runs."""


def forward_mode_is_active() -> bool:
    """Whether the code runs inside torch.autograd.forward_ad.dual_level, without which no tensor has a tangent."""
    return forward_ad._current_level >= 0


def is_fake(x: Tensor) -> bool:
    """Whether x has a shape and no values, as when torch.compile or torch.export traces."""
    return isinstance(x, FakeTensor)


is_batched = is_legacy_batchedtensor
"""(tensor) → whether it stands for several, as where torch.autograd.grad(is_grads_batched=True) calls a backward."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs a hook that was registered on it, or on all modules."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or nn.modules.module._has_any_global_hook()
    )
