"""How an op of this package becomes one of PyTorch: `torch.ops.mdm_kernels.<name>`, its fake, its derivative, its vmap.

An op is opaque to torch.compile and torch.export: one node of their graphs. Its derivative lies at the op itself (under
the Autograd key), not in the public function, so that a call of `torch.ops.mdm_kernels.<name>` has it as well.
`torch.library.register_autograd` would do this too, with more Python around each call, and fails under torch.func.grad.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.nn import Parameter

from . import private_torch

NAMESPACE = "mdm_kernels"
"""of the ops: `torch.ops.<NAMESPACE>`; nothing else says it"""

ops = getattr(torch.ops, NAMESPACE)
library = Library(NAMESPACE, "DEF")
_functions: dict[Callable, Callable] = {}
_derivatives: dict[Callable, Callable] = {}


def define(schema: str) -> Callable[[Callable], Callable]:
    """Decorator: register a launching function as `torch.ops.mdm_kernels.<name>`, which takes its place.

    The function serves every device and fakes: it allocates its results, returns them if `backend.shapes_only`, and
    launches otherwise, so that a fake result can never differ in shape, stride or dtype from the real one. Until
    `register_derivative` gives it one, the op refuses to be differentiated. Under torch.func.vmap it is called once for
    each entry of the mapped dimension.
    """

    def register(function: Callable) -> Callable:
        name = schema.split("(")[0]
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=library)
        op = getattr(ops, name).default
        _functions[op] = function
        library.impl(name, _autograd_kernel(op), "Autograd")
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(op), lib=library)
        return op

    return register


def register_derivative(op: Callable, call: Callable) -> None:
    """Run `call`, a `Derivative.apply` or a function around one, with the arguments of `op` where one of its tensors
    requires a gradient. Its forward computes the result by `below_autograd`."""
    _derivatives[op] = call


def below_autograd(op: Callable, *args):
    """Call op(*args) without its derivative. Where nobody looks on, the op's function is called itself, since another
    trip through torch's dispatcher takes as long as all checks."""
    if _are_plain(args) and not private_torch.dispatch_modes() and not private_torch.torch_func_is_active():
        return _functions[op](*args)
    with private_torch.below_autograd():
        if not private_torch.torch_func_is_active():
            return op(*args)
        with torch.enable_grad():  # an outer level of torch.func may differentiate what this one does not
            return op(*args)


class Derivative(private_torch.SingleLevelFunction):
    """Base of the ops' autograd.Functions, which autograd and torch.func reach one level of differentiation at a
    time."""

    apply: ClassVar[Callable[..., Any]]
    """torch's, which its types leave out"""

    _compiled_autograd_key = private_torch.compiled_autograd_key

    instead = "mdm_kernels.set_backend('torch')"
    """what to call to have a forward-mode derivative"""

    @classmethod
    def jvp(cls, ctx, *tangents):
        raise NotImplementedError(
            "the ops of mdm_kernels have no forward-mode derivative: use reverse mode (torch.func.vjp, jacrev), or "
            f"{cls.instead}"
        )


class _NoDerivative(Derivative):
    """Calls an op; the derivative of what it returns raises."""

    @staticmethod
    def forward(ctx, op, lengths, *leaves):
        ctx.op = op
        result = below_autograd(op, *_unflattened(leaves, lengths))
        return result if isinstance(result, Tensor) else tuple(result)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{ctx.op.name()} cannot be differentiated: the ops of mdm_kernels have first derivatives only"
        )


def _refuse_later(op: Callable, *args):
    leaves, lengths = _flattened(args)
    return _NoDerivative.apply(op, lengths, *leaves)


def _autograd_kernel(op: Callable) -> Callable:
    """What the dispatcher runs under the Autograd key."""

    def kernel(*args):
        if not _is_differentiated(args):
            return below_autograd(op, *args)
        active = private_torch.torch_func_is_active()
        with private_torch.allowed_under_torch_func() if active else contextlib.nullcontext():
            return _derivatives[op](*args) if op in _derivatives else _refuse_later(op, *args)

    return kernel


_PLAIN = frozenset({Tensor, Parameter, NoneType, bool, int, float, str})


def _are_plain(args: Sequence) -> bool:
    """Whether no argument, nor an entry of one, is a tensor or a number of a class of its own: one that is traced."""
    return all(type(arg) in _PLAIN or (type(arg) is list and _are_plain(arg)) for arg in args)


def _is_differentiated(args: Sequence) -> bool:
    """Whether a derivative of the op is wanted, in reverse mode or in forward mode."""
    if torch.is_grad_enabled() and _any_tensor(args, lambda x: x.requires_grad):
        return True
    return private_torch.forward_mode_is_active() and _any_tensor(
        args, lambda x: forward_ad.unpack_dual(x).tangent is not None
    )


def _any_tensor(args: Sequence, holds: Callable[[Tensor], bool]) -> bool:
    """Whether it holds of a tensor among the arguments or in a list among them."""
    for arg in args:
        if isinstance(arg, Tensor):
            if holds(arg):
                return True
        elif isinstance(arg, list | tuple) and _any_tensor(arg, holds):
            return True
    return False


def _one_by_one(op: Callable) -> Callable:
    """The vmap rule that suits every op: arguments without the mapped dimension are the same for each entry."""

    def rule(info, in_dims, *args):
        leaves, lengths = _flattened(args)
        dims, _ = _flattened(in_dims)

        def entry(i: int) -> list:
            selected = [x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)]
            return _unflattened(selected, lengths)

        stacked = _stacked([op(*entry(i)) for i in range(info.batch_size)])
        return stacked, _zeros_like(stacked)

    return rule


def _flattened(args: Sequence) -> tuple[list, list[int | None]]:
    """The arguments of an op with those that are lists taken apart, and the length of each list."""
    lengths = [len(arg) if isinstance(arg, list | tuple) else None for arg in args]
    parts = [[arg] if length is None else arg for arg, length in zip(args, lengths, strict=True)]
    return [leaf for part in parts for leaf in part], lengths


def _unflattened(leaves: Sequence, lengths: list[int | None]) -> list:
    rest = iter(leaves)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in lengths]


def _stacked(results: list):
    """The results of one op for each entry, tensors or nested lists and tuples of such, as one such result."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    return type(first)(_stacked(list(entries)) for entries in zip(*results, strict=True))


def _zeros_like(result):
    return 0 if isinstance(result, Tensor) else type(result)(map(_zeros_like, result))
