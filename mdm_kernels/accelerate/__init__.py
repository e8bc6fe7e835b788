"""Swaps the fused ops into a model that somebody else wrote: diffusers UNets, nn.Sequential, any nn.GroupNorm."""

from .swap import accelerate

__all__ = ["accelerate"]
