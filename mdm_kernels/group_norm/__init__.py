"""GroupNorm, FiLM and SiLU in one op."""

from .op import GroupNormSiLU, group_norm_silu

__all__ = ["GroupNormSiLU", "group_norm_silu"]
