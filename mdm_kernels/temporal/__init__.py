"""Attention over the frames of a clip, at every position, without transposing the clip."""

from .op import temporal_attention

__all__ = ["temporal_attention"]
