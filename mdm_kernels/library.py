"""How an op of this package becomes one of PyTorch: `torch.ops.mdm_kernels.<name>`, its fake, its derivative, its vmap.

An op is opaque to torch.compile and torch.export: one node of their graphs. Its derivative lies at the op itself (under
the Autograd key), not in the public function, so that a call of `torch.ops.mdm_kernels.<name>` has it as well.
`torch.library.register_autograd` would do this too, with more Python around each call, and fails under torch.func.grad.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

library = torch.library.Library("mdm_kernels", "DEF")
_derivatives: dict[torch._ops.OpOverload, Callable] = {}


def define(schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator: register a launching function as `torch.ops.mdm_kernels.<name>`, which takes its place.

    The function serves every device and fakes: it allocates its results, returns them if `backend.shapes_only`, and
    launches otherwise, so that a fake result can never differ in shape, stride or dtype from the real one. Until
    `register_derivative` gives it one, the op refuses to be differentiated. Under torch.func.vmap it is called once for
    each entry of the mapped dimension.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        name = schema.split("(")[0]
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        torch.library.register_fake(f"mdm_kernels::{name}", function, lib=library)
        op = getattr(torch.ops.mdm_kernels, name).default
        library.impl(name, _autograd_kernel(op), "Autograd")
        torch.library.register_vmap(f"mdm_kernels::{name}", _one_by_one(op), lib=library)
        return op

    return register


def register_derivative(op: torch._ops.OpOverload, call: Callable) -> None:
    """Run `call`, a `Derivative.apply` or a function around one, with the arguments of `op` where one of its tensors
    requires a gradient. Its forward computes the result by `below_autograd`."""
    _derivatives[op] = call


def below_autograd(op: torch._ops.OpOverload, *args):
    """op(*args) without its derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*args)
        with torch.enable_grad():  # an outer level of torch.func may differentiate what this one does not
            return op(*args)


class Derivative(_SingleLevelFunction):
    """Base of the ops' autograd.Functions.

    Autograd and torch.func reach them one level of differentiation at a time, below where torch.autograd.Function
    expects to be called and would ask for a `setup_context` and a `vmap`.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "the ops of mdm_kernels have no forward-mode derivative: use reverse mode (torch.func.vjp, jacrev), or "
            "mdm_kernels.set_backend('torch')"
        )


class _NoDerivative(Derivative):
    """Calls an op; the derivative of what it returns raises."""

    @staticmethod
    def forward(ctx, op, structure, *leaves):
        ctx.op = op
        result = below_autograd(op, *pytree.tree_unflatten(leaves, structure))
        return result if isinstance(result, Tensor) else tuple(result)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{ctx.op.name()} cannot be differentiated: the ops of mdm_kernels have first derivatives only"
        )


def _refuse_later(op: torch._ops.OpOverload, *args):
    leaves, structure = pytree.tree_flatten(args)
    return _NoDerivative.apply(op, structure, *leaves)


def _autograd_kernel(op: torch._ops.OpOverload) -> Callable:
    """What the dispatcher runs under the Autograd key."""

    def kernel(*args):
        differentiated = torch._C._any_requires_grad(*args) and torch.is_grad_enabled()
        if not differentiated and forward_ad._current_level < 0:
            return below_autograd(op, *args)
        with _allowed_under_torch_func():
            return _derivatives[op](*args) if op in _derivatives else _refuse_later(op, *args)

    return kernel


def _allowed_under_torch_func() -> contextlib.AbstractContextManager:
    active = torch._C._are_functorch_transforms_active()
    return enable_single_level_autograd_function() if active else contextlib.nullcontext()


def _one_by_one(op: torch._ops.OpOverload) -> Callable:
    """The vmap rule that suits every op: arguments without the mapped dimension are the same for each entry."""

    def rule(info, in_dims, *args):
        leaves, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)

        def entry(i: int) -> tuple:
            selected = [x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)]
            return pytree.tree_unflatten(selected, structure)

        results = [op(*entry(i)) for i in range(info.batch_size)]
        stacked = pytree.tree_map(lambda *entries: torch.stack(entries), *results)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule
