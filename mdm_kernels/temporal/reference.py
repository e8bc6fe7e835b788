"""Attention over the frames of a clip in plain PyTorch: what the kernel must compute, and what runs on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_attention(qkv: Tensor, num_heads: int, frames: int, rotary: Tensor | None = None) -> Tensor:
    """Compute, at each of L positions, softmax(q kᵀ/√d) v over the T = `frames` frames.

    qkv (B·T, L, 3C), the frames of a clip in consecutive rows, rotary (T, D/2) in radians → (B·T, L, C).
    """
    clips = torch.unflatten(torch.unflatten(qkv, 0, (-1, frames)), 3, (3, num_heads, -1))  # (B, T, L, 3, H, D)
    q, k, v = clips.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each (B, L, H, T, D)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    # With five dimensions PyTorch multiplies batches of matrices: for so few frames its fused CPU attention, which
    # takes four, is no faster forward and up to seven times slower backward.
    out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of channels (2i, 2i+1) of frame t by angles[t, i];  x (..., T, D), angles (T, D/2)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.to(wide).cos(), angles.to(wide).sin()
    even, odd = torch.unflatten(x.to(wide), -1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
