"""A GroupNorm and the SiLU after it as one op, wherever a model holds them as two modules.

Whether two modules may run as one is decided at every call, not when a model is accelerated: a hook registered later,
a module wrapped or replaced by another library, is honoured by running them one after the other.
"""

from typing import TypeGuard

from torch import Tensor, nn

from .. import private_torch
from ..group_norm import GroupNormSiLU, group_norm_silu
from ..group_norm.checks import check_channels


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but its class's forward: no hooks, no forward of the instance's own."""
    return not private_torch.has_hooks(module) and "forward" not in vars(module)


def runs_as_one(norm: nn.Module, activation: nn.Module) -> TypeGuard[GroupNormSiLU]:
    """Whether `activation(norm(x))` may be computed by one op."""
    return (
        type(norm) is GroupNormSiLU
        and norm.activation is None
        and type(activation) is nn.SiLU
        and is_bare(norm)
        and is_bare(activation)
    )


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Compute silu(norm(x)·(1 + scale) + shift) for a norm that has no activation of its own: x (N, C, *spatial), scale
    and shift (N, C)."""
    check_channels(x, None, norm.num_channels)
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, scale=scale, shift=shift)


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs each GroupNorm with the SiLU after it as one op.

    The modules themselves stay two, so that code which calls one of them alone gets what it always got.
    """

    def forward(self, input):
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and runs_as_one(layer, layers[0]):
                layers.pop(0)
                input = norm_silu(layer, input)
            else:
                input = layer(input)
        return input
