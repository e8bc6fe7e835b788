"""Which of diffusers' modules are swapped, and why one is not."""

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

from ..attention.checks import MAX_HEAD_WIDTH
from .diffusers_blocks import FlashAttention, FusedResnetBlock2D, is_standard
from .fused import runs_as_one
from .report import Entry, Report

UNETS = ("diffusers.models.unets.unet_2d.UNet2DModel", "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel")
"""By name: importing them takes seconds, which a model without them need not pay."""


def swap(path: str, module: nn.Module, report: Report) -> dict[int, str]:
    """Swap `module` if it is one of diffusers' that can be; report one that is left.

    → {id of a GroupNorm: the part that it is one op with now}
    """
    if isinstance(module, ResnetBlock2D):
        return _swap_resnet_block(path, module, report)
    if isinstance(module, ResnetBlockCondNorm2D):
        report.left.append(Entry(path, type(module).__name__, f"its norms are {type(module.norm1).__name__}"))
    elif isinstance(module, Attention):
        _swap_attention(path, module, report)
    elif f"{type(module).__module__}.{type(module).__qualname__}" in UNETS:
        return _swap_output(module, report)
    return {}


def _swap_resnet_block(path: str, block: ResnetBlock2D, report: Report) -> dict[int, str]:
    if isinstance(block, FusedResnetBlock2D):
        return {}
    norms = block.norm1, block.norm2
    if type(block) is not ResnetBlock2D:
        reason = "is a subclass of ResnetBlock2D; its GroupNorms and SiLUs stay two"
    elif type(block.nonlinearity) is not nn.SiLU:
        reason = f"its activation is {type(block.nonlinearity).__name__}, not SiLU; its GroupNorms run alone"
    elif not all(runs_as_one(norm, block.nonlinearity) for norm in norms) or "forward" in vars(block):
        reason = "it, its norms or its activation have hooks or a forward of their own"
    else:
        report.changes.set_class(block, FusedResnetBlock2D)
        second = "GroupNorm + FiLM + SiLU" if block.time_embedding_norm == "scale_shift" else "GroupNorm + SiLU"
        return {id(block.norm1): "GroupNorm + SiLU", id(block.norm2): second}
    report.left.append(Entry(path, type(block).__name__, reason))
    return {}


def _swap_attention(path: str, attention: Attention, report: Report) -> None:
    if isinstance(attention, FlashAttention):
        return
    processor, width = attention.processor, attention.inner_dim // attention.heads
    if type(attention) is not Attention or "forward" in vars(attention):
        reason = "is a subclass of Attention or has a forward of its own"
    elif type(processor) not in (AttnProcessor, AttnProcessor2_0):
        reason = f"its processor is {type(processor).__name__}, not one of AttnProcessor2_0, AttnProcessor"
    elif width > MAX_HEAD_WIDTH:
        reason = f"its heads are {width} wide; the kernel takes at most {MAX_HEAD_WIDTH}"
    elif not is_standard(attention):
        reason = "AttnProcessor does not apply the norms of queries and keys that it has"
    else:
        report.changes.set_class(attention, FlashAttention)
        report.swapped.append(Entry(path, "Attention", "mk.scaled_dot_product_attention"))
        return
    report.left.append(Entry(path, type(attention).__name__, reason))


def _swap_output(unet: nn.Module, report: Report) -> dict[int, str]:
    """Let the output norm of a UNet apply the SiLU that the UNet calls next; that becomes an Identity."""
    norm, activation = unet.conv_norm_out, unet.conv_act
    uses = sum(module is norm for _, module in unet.named_modules(remove_duplicate=False))
    if not isinstance(norm, nn.Module) or not isinstance(activation, nn.Module):
        return {}
    if uses != 1 or not runs_as_one(norm, activation) or "forward" in vars(unet):
        return {}
    report.changes.set_attribute(norm, "activation", "silu")
    report.changes.set_attribute(unet, "conv_act", nn.Identity().train(activation.training))
    return {id(norm): "GroupNorm + SiLU"}
