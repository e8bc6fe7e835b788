"""Attention over tokens: one softmax (`flash_attention`), or two at once (`self_cross_attention`)."""

from .op import flash_attention, scaled_dot_product_attention, self_cross_attention

__all__ = ["flash_attention", "scaled_dot_product_attention", "self_cross_attention"]
