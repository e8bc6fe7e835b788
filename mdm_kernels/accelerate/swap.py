"""accelerate: finds what can run on the fused ops in a model, and swaps it in place.

GroupNorms are swapped first, each into a GroupNormSiLU without activation. Then the modules that call a norm and a SiLU
one after the other change into subclasses that run the two as one, and attention gets another processor. Only classes
known exactly are swapped: of a subclass with a forward of its own nobody knows here what it computes.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from ..group_norm import GroupNormSiLU
from .fused import FusedSequential, runs_as_one
from .report import Entry, Report

REMEDIES = {
    F.scaled_dot_product_attention: "mk.scaled_dot_product_attention takes the same arguments",
    F.multi_head_attention_forward: "mk.scaled_dot_product_attention does what is between its projections",
}
"""What the author of a module that calls such a function may call instead."""


def accelerate(model: nn.Module) -> Report:
    """Swap the fused ops into `model`, in place, and say what was swapped and what was not.

    Swapped are
    * every nn.GroupNorm: `group_norm_silu` without activation;
    * a GroupNorm and the nn.SiLU after it, as one op: in nn.Sequential, in diffusers' ResnetBlock2D (with the time
      embedding's scale and shift, where it has them) and at the output of UNet2DModel and UNet2DConditionModel;
    * diffusers' Attention with its standard processors: `scaled_dot_product_attention`, whose kernel runs calls without
      a mask; torch's runs the others.

    Parameters, buffers, state dict, hooks and module objects stay the same (SiLU at a UNet's output becomes an
    Identity, which holds nothing either). Outputs and gradients agree to the rounding of the dtype, dropout and
    checkpointing work as before, and so do copy.deepcopy, pickle and torch.compile, which is best called afterwards.
    On CUDA and ROCm tensors the Triton kernels run; on CPU tensors their PyTorch references, which gain no speed.

    Three things differ. Under autocast a norm returns the dtype of its input, where torch's returns float32. The
    kernels have no second derivative and raise when asked for one. torch.fx and TorchScript cannot trace the ops: call
    `undo()` of the report before.

    Args:
        model: any module; it may be partly accelerated already, whereupon only the rest is swapped.

    Returns:
        A report with `swapped` and `left`, which prints as a table, and whose `undo()` takes everything back.

    Raises:
        TypeError: not an nn.Module, such as a pipeline, whose `unet` is one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be an nn.Module, such as the unet of a pipeline")
    report = Report(type(model).__name__)
    modules = dict(model.named_modules())
    norms = {path: module for path, module in modules.items() if _swap_norm(path, module, report)}
    fused = {}  # id of a norm → the part that it is one op with
    for path, module in modules.items():
        fused |= _swap_sequential(path, module, report)
        _report_torch_attention(path, module, report)
    if any(_is_from_diffusers(module) for module in modules.values()):
        from . import diffusers_rules

        for path, module in modules.items():
            fused |= diffusers_rules.swap(path, module, report)
    for path, norm in norms.items():
        if id(norm) in fused:
            report.swapped.append(Entry(path, fused[id(norm)], "mk.group_norm_silu"))
        else:
            report.swapped.append(Entry(path, "GroupNorm", "mk.group_norm_silu, activation=None"))
    return report


def _swap_norm(path: str, module: nn.Module, report: Report) -> bool:
    """Swap a GroupNorm; report one that is left. → whether it was swapped."""
    if not isinstance(module, nn.GroupNorm) or isinstance(module, GroupNormSiLU):
        return False
    kind = type(module)
    if kind is not nn.GroupNorm:
        report.left.append(Entry(path, kind.__name__, "is a subclass of GroupNorm; mk.GroupNormSiLU may replace it"))
    elif "forward" in vars(module):
        report.left.append(Entry(path, kind.__name__, "the forward of this instance has been replaced"))
    else:
        report.changes.set_class(module, GroupNormSiLU, activation=None)
        return True
    return False


def _swap_sequential(path: str, module: nn.Module, report: Report) -> dict[int, str]:
    """Swap an nn.Sequential that holds a norm with a SiLU after it. → {id of such a norm: "GroupNorm + SiLU"}"""
    if not isinstance(module, nn.Sequential) or isinstance(module, FusedSequential):
        return {}
    fused = {id(norm): "GroupNorm + SiLU" for norm, following in pairwise(module) if runs_as_one(norm, following)}
    if not fused:
        return {}
    if type(module) is not nn.Sequential or "forward" in vars(module):
        reason = "is a subclass or has a forward of its own; its GroupNorm and SiLU stay two"
        report.left.append(Entry(path, type(module).__name__, reason))
        return {}
    report.changes.set_class(module, FusedSequential)
    return fused


def _report_torch_attention(path: str, module: nn.Module, report: Report) -> None:
    """Report a module one of whose methods calls torch's attention: only its author can swap that."""
    values = [value for base in type(module).__mro__ if base not in nn.Module.__mro__ for value in vars(base).values()]
    methods = [inspect.unwrap(value) for value in values if inspect.isfunction(value)]
    for function, remedy in REMEDIES.items():
        if any(_calls(method, function) for method in methods if inspect.isfunction(method)):  # not one that wraps C's
            report.left.append(Entry(path, type(module).__name__, f"its code calls F.{function.__name__}; {remedy}"))


def _calls(method: Callable, function: Callable) -> bool:
    """Whether the code of `method` names `function`, one of torch.nn.functional's, alone or as an attribute of it."""
    names = method.__code__.co_names
    owners = [method.__globals__.get(name) for name in names] + [F] * ("functional" in names)
    name = function.__name__
    return name in names and any(getattr(owner, name, owner) is function for owner in owners)


def _is_from_diffusers(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(module).__mro__)
