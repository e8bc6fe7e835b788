"""Fused ops for diffusion UNets: drop-in PyTorch functions and modules on Triton kernels.

On CUDA and ROCm tensors they run the kernels where these are faster, on CPU tensors their PyTorch references;
`set_backend` chooses otherwise.
"""

from . import layers
from .accelerate import accelerate
from .attention import flash_attention, scaled_dot_product_attention, self_cross_attention
from .backend import set_backend, use_backend, what_ran
from .group_norm import GroupNormSiLU, group_norm_silu
from .multires import multires_loss, multires_noise
from .temporal import temporal_attention

__version__ = "0.1.0"

__all__ = [
    "GroupNormSiLU",
    "accelerate",
    "flash_attention",
    "group_norm_silu",
    "layers",
    "multires_loss",
    "multires_noise",
    "scaled_dot_product_attention",
    "self_cross_attention",
    "set_backend",
    "temporal_attention",
    "use_backend",
    "what_ran",
]
