"""A canary for each name of PyTorch's own that mdm_kernels uses: when one fails, its message says what for."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mdm_kernels
from mdm_kernels import private_torch

PACKAGE = Path(mdm_kernels.__file__).parent


def private_names(path: Path) -> set[str]:
    """Dotted names of torch in a file, imported or used, one of whose parts begins with an underscore."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("torch")}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names.add(ast.unparse(node))
    return {name for name in names if any(part.startswith("_") and part[:2] != "__" for part in name.split("."))}


def test_private_names_of_torch_stand_in_one_file():
    found = {str(path.relative_to(PACKAGE)): private_names(path) for path in PACKAGE.rglob("*.py")}
    found = {path: names for path, names in found.items() if names}
    assert list(found) == ["private_torch.py"], found


def test_single_level_function_runs_below_torch_func():
    """If this fails, library.Derivative has no base: the ops lose gradients under torch.func. Look at what
    torch.autograd.Function derives from now."""

    class Double(private_torch.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_a_single_level_function_is_allowed_under_torch_func_only_by_its_context():
    """If this fails, library._autograd_kernel must call a Derivative inside torch.func.grad in another way."""

    class Identity(private_torch.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def allowed(x):
        with private_torch.allowed_under_torch_func():
            return Identity.apply(x).sum()

    torch.func.grad(allowed)(torch.ones(2))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: Identity.apply(x).sum())(torch.ones(2))


def test_below_autograd_hides_gradients_from_an_op():
    """If this fails, an op called by library.below_autograd would call its Autograd kernel again, without end."""
    x = torch.ones(3, requires_grad=True)
    with private_torch.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_torch_func_is_active_inside_a_transform_alone():
    """If this fails, library takes the wrong branch inside torch.func.grad, or always the slow one."""
    seen = []
    torch.func.grad(lambda x: seen.append(private_torch.torch_func_is_active()) or x.sum())(torch.ones(2))
    assert seen == [True]
    assert not private_torch.torch_func_is_active()


def test_a_mode_that_sees_operators_is_counted():
    """If this fails, library.below_autograd calls an op's function where torch.compile or a user's mode waits for the
    op."""

    class Watch(private_torch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    assert private_torch.dispatch_modes() == 0
    with Watch():
        assert private_torch.dispatch_modes() == 1


def test_forward_mode_is_active_inside_a_dual_level_alone():
    """If this fails, library._is_differentiated overlooks tangents, or looks for them at every call."""
    assert not private_torch.forward_mode_is_active()
    with torch.autograd.forward_ad.dual_level():
        assert private_torch.forward_mode_is_active()
    seen = []
    one = torch.ones(1)
    torch.func.jvp(lambda x: seen.append(private_torch.forward_mode_is_active()) or x, (one,), (one,))
    assert seen == [True]


def test_compiled_autograd_key_names_a_function():
    """If this fails, compiled autograd cannot trace an op's backward: see what it asks torch.autograd.Function for."""
    assert "_compiled_autograd_key" in vars(torch.autograd.Function)
    assert callable(private_torch.compiled_autograd_key.__func__)


def test_fake_tensors_are_told_from_real_ones():
    """If this fails, an op would launch its kernel while torch.compile traces, on memory that does not exist."""
    with FakeTensorMode():
        assert private_torch.is_fake(torch.ones(1))
    assert not private_torch.is_fake(torch.ones(1))


def test_gradients_that_are_batched_are_told_from_others():
    """If this fails, the CPU's group norm has no vectorised Jacobian."""
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(private_torch.is_batched(gradient)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_a_dispatch_mode_sees_every_operator():
    """If this fails, aot.gpu_layouts does not see convolutions, and what it is for reports other launches."""
    seen = []

    class Watch(private_torch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    ],
)
def test_every_kind_of_hook_is_seen(register):
    """If this fails, accelerate runs a norm and its SiLU as one although a hook waits for one of them."""
    module = nn.SiLU()
    assert not private_torch.has_hooks(module)
    handle = register(module)
    assert private_torch.has_hooks(module)
    handle.remove()
    assert not private_torch.has_hooks(module)
