"""What the tests of `accelerate` share: a model's output and gradients before and after, and what a report counts."""

from collections import Counter

import torch
from torch import Tensor, nn


def output_and_gradients(model: nn.Module, *inputs, **arguments) -> dict[str, Tensor]:
    """The output of model(*inputs, **arguments), and the gradients of its parameters and floating-point inputs for one
    and the same gradient of the output; dropout draws the same in every call."""
    torch.manual_seed(1)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    output = model(*leaves, **arguments)
    output = getattr(output, "sample", getattr(output, "mid_block_res_sample", output))  # diffusers wraps it
    model.zero_grad()
    (output * torch.randn_like(output)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.grad is not None}
    return {"output": output.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to a hundred roundings at the size of the largest of its elements, or of 1."""
    assert results.keys() == expected.keys()
    for name, result in results.items():
        allowed = 100 * torch.finfo(result.dtype).eps * max(1.0, expected[name].abs().max().item())
        error = (result - expected[name]).abs().max().item()
        assert error <= allowed, f"{name} differs by {error}, which is more than {allowed}"


def parts(entries: list) -> Counter:
    """How often a report has each part."""
    return Counter(entry.part for entry in entries)


def with_random_norms(model: nn.Module) -> nn.Module:
    """The model, with weights and biases in its norms that do something: diffusers starts them at 1 and 0."""
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return model
