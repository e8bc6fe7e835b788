"""The ops among PyTorch's own machinery: opcheck, torch.compile, torch.export, torch.func, inference, no host syncs.

The cases are the public functions, each as a function of the tensors that it differentiates.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import mdm_kernels as mk
from mdm_kernels import backend

ops = torch.ops.mdm_kernels


class Case(NamedTuple):
    function: Callable[..., Tensor]
    node: str
    """the op that the function is in a graph"""
    shapes: tuple[tuple[int, ...], ...]
    """of the inputs, without the batch"""

    def inputs(self, batch: int = 4, device: str | None = None) -> list[Tensor]:
        return [torch.randn(batch, *shape, device=device, requires_grad=True) for shape in self.shapes]


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mk.flash_attention(q, k, v, key_mask=k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool).tril())


def rotary_attention(qkv: Tensor) -> Tensor:
    return mk.temporal_attention(qkv, num_heads=2, frames=2, rotary=qkv.new_ones(2, 8))


def images_and_alpha_bars(preds: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    images = preds[0].detach().tanh()
    return images, images.new_full((2, images.shape[0]), 0.3)


def noise(*preds: Tensor) -> Tensor:
    return mk.multires_noise(*images_and_alpha_bars(preds), [1, 4], seed=3)[1]


def loss(*preds: Tensor) -> Tensor:
    return mk.multires_loss(preds, *images_and_alpha_bars(preds), [1, 4], seed=3)


CASES = {
    "group_norm_silu": Case(
        lambda x, scale, shift: mk.group_norm_silu(x, 2, scale=scale, shift=shift),
        "group_norm_silu_forward",
        ((4, 3, 3), (4,), (4,)),
    ),
    "flash_attention": Case(masked_attention, "flash_attention_forward", ((2, 3, 16), (2, 5, 16), (2, 5, 16))),
    "self_cross_attention": Case(
        lambda qkv, context: mk.self_cross_attention(qkv, context, num_heads=2),
        "self_cross_attention_forward",
        ((3, 96), (5, 64)),
    ),
    "temporal_attention": Case(rotary_attention, "temporal_attention_forward", ((3, 96),)),
    "multires_loss": Case(loss, "multires_loss_forward", ((3, 8, 8), (3, 2, 2))),
}
each_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
on_both_backends = pytest.mark.parametrize("name", ["triton", "torch"])


def result_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    result = function(*inputs)
    return result.detach(), *torch.autograd.grad(result.square().sum(), inputs)


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # float32, and the two backends sum differently


# The ops themselves


def test_every_op_has_an_autograd_kernel_and_a_vmap_rule():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mdm_kernels::")]
    assert names
    for name in names:
        for key in ("Autograd", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


def test_the_residuals_of_the_loss_are_differentiable_too():
    preds = CASES["multires_loss"].inputs()
    arguments = *images_and_alpha_bars(preds), [1, 1], [1, 4], [], 3, None, "v", "eps", [1.0, 2.0], True
    loss, (residual, _) = ops.multires_loss_forward(preds, *arguments)
    (from_residual,) = torch.autograd.grad(residual.sum(), preds[:1], retain_graph=True)
    (from_loss,) = torch.autograd.grad(loss.sum(), preds[:1], retain_graph=True)
    (from_both,) = torch.autograd.grad(residual.sum() + loss.sum(), preds[:1])
    assert torch.equal(from_residual, torch.ones_like(from_residual))
    assert torch.equal(from_both, from_residual + from_loss)


def test_differentiating_what_has_no_derivative_names_the_op():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    x_t, _ = ops.multires_noise(images, torch.rand(2, 4), [1, 1], [1, 4], [], 3, None)
    with pytest.raises(RuntimeError, match="mdm_kernels::multires_noise cannot be differentiated"):
        x_t.sum().backward()


@each_op
def test_a_gradient_of_an_undefined_gradient_is_undefined(case):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    inputs = case.inputs()
    with mk.use_backend("triton"):
        gradients = torch.autograd.grad(Nothing.apply(case.function(*inputs)).sum(), inputs, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


# torch.compile and torch.export


@each_op
def test_the_op_compiles_once_for_every_batch_size(case):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.function, fullgraph=True, backend=counter)
    with mk.use_backend("triton"):
        for batch in (4, 6):
            inputs = case.inputs(batch)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 0)
            assert_close(result_and_gradients(compiled, inputs), result_and_gradients(case.function, inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("default_device", [False, True])
@pytest.mark.parametrize("name", ["flash_attention", "self_cross_attention", "temporal_attention"])
def test_the_reference_compiles(name, default_device):
    """Under a default device too, where torch 2.11 cannot trace those methods of tensors that are written in Python."""
    case = CASES[name]  # the other ops have this test, and more, in their own files
    inputs = case.inputs()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    with torch.get_default_device() if default_device else contextlib.nullcontext():
        assert_close(result_and_gradients(compiled, inputs), result_and_gradients(case.function, inputs))


def test_compiled_autograd_traces_a_backward():
    case = CASES["temporal_attention"]
    (x,) = case.inputs()
    _, expected = result_and_gradients(case.function, [x])
    with mk.use_backend("triton"), compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        case.function(x).square().sum().backward()
    assert_close(x.grad, expected)


class Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@each_op
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exports_as_one_node(case, strict):
    inputs = tuple(case.inputs())
    with mk.use_backend("triton"):
        program = torch.export.export(Module(case.function), inputs, strict=strict)
        nodes = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mdm_kernels")]
        assert nodes == [f"mdm_kernels.{case.node}.default"]
        assert_close(program.module()(*inputs), case.function(*inputs))


@each_op
def test_the_reference_exports(case):
    inputs = tuple(case.inputs())
    program = torch.export.export(Module(case.function), inputs)
    assert_close(program.module()(*inputs), case.function(*inputs))


# torch.func


@each_op
@on_both_backends
def test_func_grad_is_the_gradient(case, name):
    """Autograd's on the same backend: what is 0 in exact arithmetic, the gradient of the logit of a query's only key,
    either backend may miss by more than `assert_close` allows."""
    inputs = case.inputs()
    every = tuple(range(len(inputs)))
    with mk.use_backend(name):
        _, *expected = result_and_gradients(case.function, inputs)
        gradients = torch.func.grad(lambda *x: case.function(*x).square().sum(), every)(*inputs)
    assert_close(gradients, tuple(expected))


@each_op
def test_a_vmap_maps_values_and_gradients(case):
    """Along the last dimension, so that every entry is strided. In float64 the gradient of the logit of a query's only
    key is 0, which PyTorch's in float32 misses by 1e-5 on an H100."""
    entries = [case.inputs() for _ in range(2)]
    stacked = [torch.stack(xs, -1).detach() for xs in zip(*entries, strict=True)]

    def function(*inputs):
        return case.function(*inputs).square().sum()

    every = tuple(range(len(stacked)))
    expected = [result_and_gradients(case.function, [x.double() for x in inputs]) for inputs in entries]
    with mk.use_backend("triton"):
        values = torch.func.vmap(case.function, in_dims=-1)(*stacked)
        gradients = torch.func.vmap(torch.func.grad(function, every), in_dims=-1)(*stacked)
    for i, (value, *of_entry) in enumerate(expected):
        actual = [values[i], *(gradient[i] for gradient in gradients)]
        assert_close([x.double() for x in actual], [value, *of_entry])


def test_func_reaches_the_parameters_of_a_module_for_each_sample():
    norm = mk.GroupNormSiLU(2, 4)
    x = torch.randn(3, 4, 5)

    def loss(parameters, sample):
        return torch.func.functional_call(norm, parameters, (sample[None],)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(parameters, x)
    with mk.use_backend("triton"):
        assert_close(per_sample(parameters, x), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.shapes) > 1])
def test_an_outer_derivative_sees_through_an_inner_one(name):
    """autograd differentiates a value that torch.func has differentiated at the same time with respect to another."""
    case = CASES[name]
    first, *others = case.inputs()
    with mk.use_backend("triton"):
        _, value = torch.func.grad_and_value(lambda x: case.function(x, *others).square().sum())(first.detach())
        gradients = torch.autograd.grad(value, others)
        _, _, *expected = result_and_gradients(case.function, [first, *others])
    assert_close(gradients, tuple(expected))


@each_op
def test_second_derivatives_by_torch_func_are_refused(case):
    first, *others = (x.detach() for x in case.inputs())
    gradient = torch.func.grad(lambda x: case.function(x, *others).sum())
    second_derivative = torch.func.grad(lambda x: gradient(x).sum())
    with mk.use_backend("triton"), pytest.raises(RuntimeError, match=r"mdm_kernels::\w+ cannot be differentiated"):
        second_derivative(first)


@each_op
def test_forward_mode_is_refused(case):
    inputs = tuple(x.detach() for x in case.inputs())
    with mk.use_backend("triton"), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(case.function, inputs, inputs)


@each_op
def test_forward_mode_is_had_by_following_the_advice(case):
    """By torch's reference, and for attention by its unfused kernel: the error says so."""
    inputs = tuple(x.detach() for x in case.inputs())
    with mk.use_backend("triton"), pytest.raises(NotImplementedError) as refusal:
        torch.func.jvp(case.function, inputs, inputs)
    assert "mdm_kernels.set_backend('torch')" in str(refusal.value)
    advised = "sdpa_kernel(SDPBackend.MATH)" in str(refusal.value)
    with mk.use_backend("torch"), sdpa_kernel(SDPBackend.MATH) if advised else contextlib.nullcontext():
        value, derivative = torch.func.jvp(case.function, inputs, inputs)
    assert_close(value, case.function(*inputs))
    leaves = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(case.function(*leaves).sum(), leaves)
    directional = sum((gradient * x).sum() for gradient, x in zip(gradients, inputs, strict=True))
    torch.testing.assert_close(derivative.sum(), directional, rtol=1e-3, atol=1e-3)


# Inference, streams of work, devices


@each_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_saves_nothing_and_computes_the_same(case, mode):
    inputs, saved = case.inputs(), []
    expected = case.function(*inputs)
    with mk.use_backend("triton"), mode(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        result = case.function(*inputs)
    assert_close(result, expected.detach())
    assert not result.requires_grad
    assert not saved


@pytest.mark.parametrize("function", [*(case.function for case in CASES.values()), noise], ids=[*CASES, "noise"])
def test_no_call_looks_at_a_value_or_leaves_the_device(function):
    """Meta tensors have no values to look at (what a CUDA graph could not capture would raise here), and a tensor
    allocated on another device shows among the arguments of the launches."""
    case = next((case for case in CASES.values() if case.function is function), CASES["multires_loss"])
    inputs, launched = case.inputs(device="meta"), []
    with mk.use_backend("triton"), backend.recording(lambda kernel, arguments: launched.extend(arguments.values())):
        result = function(*inputs)
        if result.requires_grad:
            torch.autograd.grad(result, inputs, torch.empty_like(result))
    devices = {x.device.type for x in launched if isinstance(x, Tensor)}
    assert devices == {"meta"}
