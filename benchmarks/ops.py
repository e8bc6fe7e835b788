"""Each op of `mdm_kernels` beside plain PyTorch, forward alone and forward with backward, beside its floor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import mdm_kernels as mk
from benchmarks import plain
from benchmarks.report import Row
from benchmarks.timing import peak_memory, rotating, time_side_by_side

CACHE_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}  # inputs in rotation take at least this much together


@dataclass(frozen=True)
class OpCase:
    """One op at one shape. `inputs(dtype, device)` draws its tensors; those of a float dtype are differentiated if
    `backward`. The least traffic is counted in elements of `dtype`."""

    op: str
    shape: str
    inputs: Callable[[torch.dtype, torch.device], tuple[Tensor, ...]]
    ours: Callable[..., Tensor | list[Tensor]]
    plain: Callable[..., Tensor | list[Tensor]]
    backward: bool
    forward_elements: int
    backward_elements: int = 0
    forward_flops: int = 0
    samples: int = 1


def _group_norm(batch: int, channels: int, size: int) -> OpCase:
    def inputs(dtype, device):
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        film = torch.randn(2, batch, channels, device=device, dtype=dtype)
        affine = torch.randn(2, channels, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last), *affine, *film

    def call(op):
        return lambda x, weight, bias, scale, shift: op(x, 32, weight, bias, scale=scale, shift=shift)

    elements = batch * channels * size**2
    return OpCase(
        "group_norm_silu + FiLM",
        f"{batch}×{channels}×{size}²",
        inputs,
        call(mk.group_norm_silu),
        call(plain.group_norm_silu),
        backward=True,
        forward_elements=2 * elements,
        backward_elements=3 * elements,
        samples=batch,
    )


def _self_cross(batch: int, length: int, text: int, head_dim: int) -> OpCase:
    width = 8 * head_dim

    def inputs(dtype, device):
        qkv = torch.randn(batch, length, 3 * width, device=device, dtype=dtype)
        return qkv, torch.randn(batch, text, 2 * width, device=device, dtype=dtype)

    elements = batch * width * (4 * length + 2 * text)
    return OpCase(
        "self_cross_attention",
        f"{batch}×{length}+{text} tokens, 8×{head_dim}",
        inputs,
        lambda qkv, kv: mk.self_cross_attention(qkv, kv, num_heads=8),
        lambda qkv, kv: plain.self_cross_attention(qkv, kv, num_heads=8),
        backward=True,
        forward_elements=elements,
        backward_elements=2 * elements,
        forward_flops=4 * batch * length * (length + text) * width,
        samples=batch,
    )


def _flash(batch: int, length: int, head_dim: int) -> OpCase:
    def inputs(dtype, device):
        return tuple(torch.randn(3, batch, 8, length, head_dim, device=device, dtype=dtype))

    elements = 4 * batch * 8 * length * head_dim
    return OpCase(
        "flash_attention",
        f"{batch}×{length} tokens, 8×{head_dim}",
        inputs,
        mk.flash_attention,
        plain.flash_attention,
        backward=True,
        forward_elements=elements,
        backward_elements=2 * elements,
        forward_flops=4 * batch * length**2 * 8 * head_dim,
        samples=batch,
    )


def _temporal(batch: int, frames: int, size: int) -> OpCase:
    def inputs(dtype, device):
        return (torch.randn(batch * frames, size**2, 3 * 256, device=device, dtype=dtype),)

    elements = 4 * batch * frames * size**2 * 256
    return OpCase(
        "temporal_attention",
        f"{batch}×{frames}×{size}², 8×32",
        inputs,
        lambda qkv: mk.temporal_attention(qkv, num_heads=8, frames=frames),
        lambda qkv: plain.temporal_attention(qkv, num_heads=8, frames=frames),
        backward=True,
        forward_elements=elements,
        backward_elements=2 * elements,
        forward_flops=4 * batch * size**2 * frames**2 * 256,
        samples=batch,
    )


def _multires(batch: int, size: int, strides: tuple[int, ...]) -> Iterator[OpCase]:
    """Noise and loss; plain PyTorch has to draw the noise into memory once, which its noising is charged with."""
    image = 3 * size**2
    levels = sum(image // stride**2 for stride in strides)
    shape = f"{batch}×3×{size}² at " + "+".join(str(size // stride) for stride in strides)

    def shapes() -> list[tuple[int, ...]]:
        return [(batch, 3, size // stride, size // stride) for stride in strides]

    def noise_inputs(dtype, device):
        images = torch.rand(batch, 3, size, size, device=device, dtype=dtype) * 2 - 1
        return images, torch.rand(len(strides), batch, device=device)

    def plain_noise(images, alpha_bars):
        noise = [torch.randn(shape, device=images.device, dtype=images.dtype) for shape in shapes()]
        return plain.multires_noise(images, alpha_bars, strides, noise)

    yield OpCase(
        "multires_noise, seeded",
        shape,
        noise_inputs,
        lambda images, alpha_bars: mk.multires_noise(images, alpha_bars, strides, seed=1),
        plain_noise,
        backward=False,
        forward_elements=batch * (image + levels),
        samples=batch,
    )

    def loss_inputs(dtype, device):
        images, alpha_bars = noise_inputs(dtype, device)
        preds = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes()]
        noise = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes()]
        return *preds, images, alpha_bars, *noise

    def split(tensors):
        n = len(strides)
        return tensors[:n], *tensors[n : n + 2], tensors[n + 2 :]

    def our_loss(*tensors):
        preds, images, alpha_bars, _ = split(tensors)
        return mk.multires_loss(preds, images.detach(), alpha_bars.detach(), strides, seed=1)

    def plain_loss(*tensors):
        preds, images, alpha_bars, noise = split(tensors)
        noise = [level.detach() for level in noise]
        return plain.multires_loss(preds, images.detach(), alpha_bars.detach(), strides, noise)

    yield OpCase(
        "multires_loss, seeded",
        shape,
        loss_inputs,
        our_loss,
        plain_loss,
        backward=True,
        forward_elements=batch * (image + levels),
        backward_elements=batch * levels,
        samples=batch,
    )


def cases(device: torch.device, quick: bool) -> list[OpCase]:
    """The shapes that the models use: at a training batch on a GPU, at batch 1 on a CPU, smaller ones if `quick`."""
    if quick:
        shapes = [_group_norm(1, 64, 32), _self_cross(1, 256, 32, 64), _flash(1, 256, 64), _temporal(1, 16, 8)]
        return [*shapes, *_multires(2, 64, (1, 4))]
    batch = 16 if device.type == "cuda" else 1
    shapes = [
        _group_norm(batch, 256, 64),
        _group_norm(batch, 512, 32),
        _group_norm(batch, 768, 16),
        _group_norm(batch, 64, 256),
        _group_norm(max(batch // 8, 1), 32, 1024),
        _self_cross(batch, 1024, 128, 64),
        _self_cross(batch, 256, 128, 96),
        _flash(batch, 1024, 64),
        _flash(batch, 256, 96),
        _temporal(max(batch // 8, 1), 16, 32),
    ]
    return [*shapes, *_multires(batch, 256, (1, 4)), *_multires(max(batch // 8, 1), 1024, (1, 4, 16))]


def measure(case: OpCase, dtype: torch.dtype, device: torch.device, rates, seconds: float) -> Iterator[Row]:
    """A row for the forward pass, and one for forward and backward together if the op has a backward."""
    size = torch.finfo(dtype).bits // 8
    first = case.inputs(dtype, device)
    one_set = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies = min(max(CACHE_BYTES[device.type] // one_set, 1), 16)
    inputs = [first, *(case.inputs(dtype, device) for _ in range(copies - 1))]
    passes = [("forward", False)] + ([("forward + backward", True)] if case.backward else [])
    for name, with_backward in passes:
        calls = {
            who: rotating(inputs, _with_gradients(op) if with_backward else torch.no_grad()(op))
            for who, op in (("ours", case.ours), ("plain", case.plain))
        }
        elements = case.forward_elements + (case.backward_elements if with_backward else 0)
        flops = case.forward_flops * (3.5 if with_backward else 1)  # the backward recomputes the scores: five products
        yield Row(
            group="op",
            name=case.op,
            shape=case.shape,
            step=name,
            samples=case.samples,
            timings=time_side_by_side(calls, device, seconds=seconds),
            peaks={who: peak_memory(call, device) for who, call in calls.items()},
            floor=max(elements * size / rates.copy, flops / rates.matrix),
        )


def _with_gradients(op: Callable) -> Callable:
    def call(*tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = op(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    return call
