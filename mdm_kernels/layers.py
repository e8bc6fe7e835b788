"""Layers in the form of Hugging Face's `kernels` library: a forward and nothing else, for modules made elsewhere.

`kernels.kernelize` gives such a forward to the modules of a model, which keep their own parameters and attributes.
"""

from torch import Tensor, nn

from .group_norm import group_norm_silu


class GroupNorm(nn.Module):
    """The forward of an nn.GroupNorm on the fused op.  input (N, C, *spatial) → its shape, dtype and memory format."""

    has_backward = True
    can_torch_compile = True

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, activation=None)


class GroupNormSiLU(nn.Module):
    """The forward of a `mdm_kernels.GroupNormSiLU` on the fused op.

    input (N, C, *spatial), skip (N, C', *spatial), scale and shift (N / T, C + C') → (N, C + C', *spatial) in the
    input's dtype and memory format.
    """

    has_backward = True
    can_torch_compile = True

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str | None

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps,
            skip=skip, scale=scale, shift=shift, activation=self.activation,
        )  # fmt: skip
