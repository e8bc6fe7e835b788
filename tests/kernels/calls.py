"""Calls of the ops, to be run on any backend in any dtype: results, and the gradients of all differentiable inputs."""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

import mdm_kernels as mk
from mdm_kernels import tma
from mdm_kernels.group_norm import launch as group_norm_launch

KEPT_IN_FLOAT32 = ("alpha_bars", "rotary")  # at every dtype of the rest but float64


def mapped(function: Callable[[Tensor], Tensor], value):
    """`value` with `function` of every tensor in it; lists are gone through."""
    if isinstance(value, Tensor):
        return function(value)
    return [mapped(function, item) for item in value] if isinstance(value, list) else value


def tensors_in(value) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) or x, value)
    return found


@dataclass(frozen=True)
class Call:
    """`function(**arguments)`, of which the arguments named in `differentiable` have gradients."""

    function: Callable
    arguments: dict
    differentiable: tuple[str, ...] = ()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """The call with `function` of every tensor in its arguments."""
        return dataclasses.replace(self, arguments={k: mapped(function, v) for k, v in self.arguments.items()})

    def to(self, dtype: torch.dtype) -> "Call":
        """The call with its floating-point tensors in `dtype`."""

        def cast(name, x):
            kept = not x.is_floating_point() or (name in KEPT_IN_FLOAT32 and dtype != torch.float64)
            return x if kept else x.to(dtype)

        arguments = {k: mapped(lambda x, k=k: cast(k, x), v) for k, v in self.arguments.items()}
        return dataclasses.replace(self, arguments=arguments)

    def run(self, backend: str, upstream: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The results, then the gradients of every differentiable tensor under a fixed gradient of the results, or the
        one that `upstream` gives for each of them."""
        arguments = dict(self.arguments)
        for name in self.differentiable:
            arguments[name] = mapped(lambda x: x.detach().requires_grad_(), arguments[name])
        with mk.use_backend(backend):
            results = tensors_in(self.function(**arguments))
            leaves = [x for name in self.differentiable for x in tensors_in(arguments[name])]
            if not leaves:
                return results
            gradients = torch.autograd.grad(results, leaves, [(upstream or upstream_gradient)(y) for y in results])
        return [*(y.detach() for y in results), *gradients]


@dataclass(frozen=True)
class Inside(Call):
    """A call that runs inside a context, which turns an experiment on."""

    context: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def run(self, *args) -> list[Tensor]:
        with self.context():
            return super().run(*args)


def in_one_pass(call: Call) -> Inside:
    """A call of group_norm whose groups, where they are too large for one program, are normalised in one pass."""
    return Inside(call.function, call.arguments, call.differentiable, group_norm_launch.one_pass)


def by_tma(call: Call) -> Inside:
    """A call of attention whose tiles of keys and values come by TMA, where that can be."""
    return Inside(call.function, call.arguments, call.differentiable, tma.by_tma)


def upstream_gradient(y: Tensor) -> Tensor:
    """A gradient of y that differs from element to element, in y's memory format: the same at every call, and in every
    dtype, since its values are multiples of 1/64 up to 1."""
    values = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).mul_(64).round_().div_(64)
    return torch.empty_like(y).copy_(values.view(y.shape))


def group_norm(*shape: int, groups=2, film_rows=0, skip=0, channels_last=True, activation: str | None = "silu") -> Call:
    """x of `shape`; `skip`: channels of a second input, if any; `film_rows`: rows of scale and shift, if any."""
    channels = shape[1] + skip
    last = torch.channels_last if channels_last else torch.contiguous_format
    inputs = {"x": torch.randn(shape).contiguous(memory_format=last)}
    if skip:
        inputs["skip"] = torch.randn(shape[0], skip, *shape[2:]).contiguous(memory_format=last)
    inputs |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    if film_rows:
        inputs["scale"], inputs["shift"] = torch.randn(film_rows, 2 * channels).chunk(2, dim=1)
    return Call(mk.group_norm_silu, inputs | {"num_groups": groups, "activation": activation}, tuple(inputs))


def flash(batch=1, heads=1, queries=5, keys=7, width=16, masked=True) -> Call:
    inputs = {
        name: torch.randn(batch, tokens, heads, width).transpose(1, 2)
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    }
    return Call(mk.flash_attention, inputs | {"key_mask": key_mask(batch, keys) if masked else None}, tuple(inputs))


def self_cross(batch=1, tokens=5, context: int = 7, heads=1, width=16, masked=True, channels_last=True) -> Call:
    """channels_last: whether qkv comes from a convolution in that memory format."""
    channels = heads * width
    qkv = torch.randn(batch, tokens, 3 * channels)
    inputs = {"qkv": qkv if channels_last else qkv.mT.contiguous().mT}
    if context:
        inputs["context_kv"] = torch.randn(batch, context, 2 * channels)
    mask = key_mask(batch, context) if masked else None
    return Call(mk.self_cross_attention, inputs | {"num_heads": heads, "key_mask": mask}, tuple(inputs))


def key_mask(batch: int, keys: int) -> Tensor:
    """About half of the keys, the first one always."""
    return (torch.rand(batch, keys) > 0.5).index_fill_(1, torch.zeros(1, dtype=torch.int64), True)


def temporal(clips=1, frames=3, positions=2, heads=1, width=16, rotary=False) -> Call:
    arguments = {
        "qkv": torch.randn(clips * frames, positions, 3 * heads * width), "num_heads": heads, "frames": frames,
        "rotary": 10 * torch.randn(frames, width // 2) if rotary else None,
    }  # fmt: skip
    return Call(mk.temporal_attention, arguments, ("qkv",))


def multires(*shape: int, strides: list, seed: int | None = 7, channels_last=True) -> dict:
    """The arguments that multires_noise and multires_loss share; with no seed, the noise is given."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    images = torch.randn(shape).contiguous(memory_format=last if channels_last else torch.contiguous_format)
    alpha_bars = torch.rand(len(strides), shape[0]) * 0.9 + 0.05  # clear of 0 and 1, where changes of space diverge
    noise = None if seed is not None else like_levels(images, strides)
    return {"images": images, "alpha_bars": alpha_bars, "strides": strides, "noise": noise, "seed": seed}


def like_levels(images: Tensor, strides: list, rows: list[int] | None = None) -> list[Tensor]:
    """Normal numbers in the shape of every level, of which the first rows[i] samples if rows are given."""
    levels = []
    for i, stride in enumerate(strides):
        time, space = stride if isinstance(stride, tuple) else (1, stride)
        level = images[: rows[i] if rows else None, ..., ::space, ::space]
        levels.append(torch.randn_like(level if images.dim() == 4 else level[:, :, ::time]))
    return levels


def multires_noise(*shape: int, **options) -> Call:
    return Call(mk.multires_noise, multires(*shape, **options))


def multires_loss(*shape: int, rows: list[int] | None = None, **options) -> Call:
    shared = multires(*shape, **options)
    preds = like_levels(shared["images"], shared["strides"], rows)
    return Call(mk.multires_loss, {"preds": preds, "rows": rows} | shared, ("preds",))


EVERY_OP: dict[str, Callable[[], Call]] = {
    "group_norm": lambda: group_norm(2, 6, 5, 7, film_rows=1),
    "group_norm, NCHW": lambda: group_norm(2, 6, 5, 7, film_rows=2, channels_last=False),
    "group_norm, skip": lambda: group_norm(2, 5, 5, 3, skip=4, groups=3),
    "group_norm, skip, NCHW": lambda: group_norm(2, 5, 5, 3, skip=4, groups=3, channels_last=False),
    "flash": lambda: flash(batch=2, heads=2, queries=33, keys=21, width=20),
    "self_cross": lambda: self_cross(batch=2, tokens=19, context=21, heads=2, width=24),
    "self_cross, NCHW": lambda: self_cross(tokens=35, context=5, width=40, masked=False, channels_last=False),
    "self alone": lambda: self_cross(tokens=17, context=0, width=16, masked=False),
    "temporal": lambda: temporal(clips=2, frames=5, positions=4, heads=2, width=21),
    "temporal, rotary": lambda: temporal(frames=3, positions=6, heads=2, width=18, rotary=True),
    "multires_noise": lambda: multires_noise(2, 3, 8, 12, strides=[1, 4]),
    "multires_noise, clips": lambda: multires_noise(1, 3, 4, 6, 10, strides=[1, (2, 2)], seed=None),
    "multires_loss": lambda: multires_loss(3, 3, 12, 12, strides=[1, 4], rows=[2, 3]),
    "multires_loss, clips": lambda: multires_loss(1, 3, 4, 6, 10, strides=[1, (2, 2)], seed=None, channels_last=False),
}
"""A small call of every op, of sizes that fill no tile, with every kind of input."""
