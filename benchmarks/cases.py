"""The ops that `benchmarks/kernels.py` measures: ours, plain PyTorch's, and the floor.

The floor counts the bytes that must move, each tensor read or written once, and the operations that must be done. Those
of pointwise ops are rough counts: they place an op on the roofline's axis and never decide its floor.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import mdm_kernels as mk
from benchmarks import libraries, plain
from benchmarks.case import Case, Place
from mdm_kernels import tma
from mdm_kernels.group_norm import launch

GROUP_NORM_OPERATIONS = (10, 20)  # an element, forward and backward: shift, mean, deviation, affine form, SiLU
SAMPLER_OPERATIONS = 45  # an element: a normal number, guidance, x₀, clip, posterior mean


def group_norm(place: Place, batch: int, channels: int, size: int, *, film: bool = False, skip: int = 0) -> Case:
    """Make a case of group_norm_silu in 32 groups on channels_last, with FiLM, or with a second input of `skip`
    channels."""
    options = ("scale", "shift") * film + ("skip",) * bool(skip)
    total = channels + skip

    def image(channels: int) -> Tensor:
        return place.randn(batch, channels, size, size).to(memory_format=torch.channels_last)

    def inputs():
        second = (place.randn(batch, total), place.randn(batch, total)) if film else (image(skip),) if skip else ()
        return image(channels), place.randn(total), place.randn(total), *second

    def call(op):
        def group_norm_silu(x, weight, bias, *second):
            return op(x, 32, weight, bias, **dict(zip(options, second, strict=True)))

        return group_norm_silu

    forward, backward = GROUP_NORM_OPERATIONS
    elements = batch * total * size**2
    return Case(
        op="group_norm_silu" + " + FiLM" * film + " + skip" * bool(skip),
        shape=f"{batch}×{channels}" + f"+{skip}" * bool(skip) + f"×{size}²",
        inputs=inputs,
        ours=call(mk.group_norm_silu),
        plain=call(plain.group_norm_silu),
        oracle=call(mk.group_norm_silu),
        forward_bytes=2 * elements * place.itemsize,
        backward_bytes=3 * elements * place.itemsize,
        forward_operations=forward * elements,
        backward_operations=backward * elements,
        sample_dims=(0, None, None) + (0,) * len(options),
        libraries={} if options else libraries.group_norm_silu(32, channels),
    )


def group_norm_in_one_pass(place: Place, batch: int, channels: int, size: int, *, skip: int = 0) -> Case:
    """Make a case of group_norm_silu at a size that goes by tiles, and the experiment with the same in one pass."""
    experiments = {"ours in one pass": launch.one_pass}
    return dataclasses.replace(group_norm(place, batch, channels, size, skip=skip), experiments=experiments)


def self_cross_attention(place: Place, batch: int, tokens: int, text: int, width: int) -> Case:
    """Make a case of self_cross_attention with 8 heads of `width` channels over `tokens` image tokens and `text` text
    tokens."""
    channels = 8 * width
    elements = batch * channels * (4 * tokens + 2 * text)  # q, k, v, out; k and v of the text
    operations = 4 * batch * tokens * (tokens + text) * channels
    return Case(
        op="self_cross_attention",
        shape=f"{batch}×{tokens}+{text} tokens, 8×{width}",
        inputs=lambda: (place.randn(batch, tokens, 3 * channels), place.randn(batch, text, 2 * channels)),
        ours=functools.partial(mk.self_cross_attention, num_heads=8),
        plain=functools.partial(plain.self_cross_attention, num_heads=8),
        oracle=functools.partial(mk.self_cross_attention, num_heads=8),
        forward_bytes=elements * place.itemsize,
        backward_bytes=2 * elements * place.itemsize,
        forward_operations=operations,
        backward_operations=operations * 5 // 2,  # five products for two: the scores are computed anew
        sample_dims=(0, 0),
        uses_sdpa=True,
        libraries=libraries.self_cross_attention(8),
    )


def by_tma(case: Case) -> Case:
    """Add to a case of attention the experiment with the same, whose tiles come by TMA."""
    return dataclasses.replace(case, experiments={"ours by TMA": tma.by_tma})


def flash_attention(place: Place, batch: int, tokens: int, width: int) -> Case:
    """Make a case of flash_attention with 8 heads of `width` channels over `tokens` tokens."""
    elements = 4 * batch * 8 * tokens * width
    operations = 4 * batch * tokens**2 * 8 * width
    return Case(
        op="flash_attention",
        shape=f"{batch}×{tokens} tokens, 8×{width}",
        inputs=lambda: tuple(place.randn(3, batch, 8, tokens, width)),
        ours=mk.flash_attention,
        plain=plain.flash_attention,
        oracle=mk.flash_attention,
        forward_bytes=elements * place.itemsize,
        backward_bytes=2 * elements * place.itemsize,
        forward_operations=operations,
        backward_operations=operations * 5 // 2,
        sample_dims=(0, 0, 0),
        uses_sdpa=True,
        libraries=libraries.flash_attention(),
    )


def temporal_attention(place: Place, batch: int, frames: int, size: int) -> Case:
    """Make a case of temporal_attention with 8 heads of 32 channels over the frames at each of size² positions."""
    channels = 8 * 32
    part = batch * frames * size**2 * channels
    options = {"num_heads": 8, "frames": frames}
    return Case(
        op="temporal_attention",
        shape=f"{batch}×{frames}×{size}², 8×32",
        inputs=lambda: (place.randn(batch * frames, size**2, 3 * channels),),
        ours=functools.partial(mk.temporal_attention, **options),
        plain=functools.partial(plain.temporal_attention, **options),
        oracle=functools.partial(mk.temporal_attention, **options),
        forward_bytes=4 * part * place.itemsize,
        backward_bytes=7 * part * place.itemsize,  # q, k, v and the gradient read; three gradients written
        forward_operations=4 * part * frames,
        backward_operations=10 * part * frames,
        sample_dims=(0,),
        sample_rows=frames,
        uses_sdpa=True,
    )


def sampler_step(place: Place, batch: int, size: int) -> Case:
    """Make a case of a sampler's step: guidance, x₀, clipping, ancestral update and noise at one level. No kernel of
    ours does this: what the compiled one leaves to its floor says whether to write one."""
    shape = (batch, 3, size, size)
    elements = torch.Size(shape).numel()
    return Case(
        op="sampler step",
        shape=f"{batch}×3×{size}²",
        inputs=lambda: (
            place.randn(*shape, dtype=torch.float32),
            place.randn(2 * batch, *shape[1:]),
            *torch.rand(2, batch, device=place.device).sort(dim=0).values,
        ),
        ours=None,
        plain=plain.sampler_step,
        forward_bytes=elements * (4 + 2 * place.itemsize + 4),
        forward_operations=SAMPLER_OPERATIONS * elements,
    )


def diffusers_resnet(place: Place, batch: int, channels: int, size: int) -> Case:
    """Make a case of diffusers' ResnetBlock2D as it is, and with the ops that `accelerate` swaps in."""

    blocks: dict[str, torch.nn.Module] = {}

    def make_blocks() -> None:
        from diffusers.models.resnet import ResnetBlock2D

        torch.manual_seed(0)
        block = ResnetBlock2D(in_channels=channels, temb_channels=4 * channels, time_embedding_norm="scale_shift")
        block = block.to(place.device).to(memory_format=torch.channels_last).requires_grad_(False)
        ours = copy.deepcopy(block).to(place.dtype)
        mk.accelerate(ours)
        blocks.update(ours=ours, oracle=copy.deepcopy(block).double(), plain=block.to(place.dtype))

    def call(name: str) -> Callable:
        def resnet(x: Tensor, embedding: Tensor) -> Tensor:
            if not blocks:  # where diffusers is missing, the calls fail, not the list of cases
                make_blocks()
            return blocks[name](x, embedding)

        return resnet

    pixels = batch * size**2
    operations = 2 * (2 * 9 * channels**2) * pixels + 2 * batch * 4 * channels * 2 * channels
    return Case(
        op="diffusers ResnetBlock2D",
        shape=f"{batch}×{channels}×{size}²",
        inputs=lambda: (
            place.randn(batch, channels, size, size).to(memory_format=torch.channels_last),
            place.randn(batch, 4 * channels),
        ),
        ours=call("ours"),
        plain=call("plain"),
        oracle=call("oracle"),
        forward_bytes=2 * pixels * channels * place.itemsize,
        backward_bytes=3 * pixels * channels * place.itemsize,
        forward_operations=operations,
        backward_operations=operations,  # of the inputs alone: the weights are frozen
        sample_dims=(0, 0),
    )
