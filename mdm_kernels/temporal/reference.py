"""Attention over the frames of a clip in plain PyTorch: what the kernel must compute, and what runs on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_attention(qkv: Tensor, num_heads: int, frames: int, rotary: Tensor | None = None) -> Tensor:
    """At each of L positions, softmax(q kᵀ/√d) v over the T = `frames` frames.

    qkv (B·T, L, 3C), the frames of a clip in consecutive rows, rotary (T, D/2) in radians → (B·T, L, C).
    """
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()  # PyTorch's fused CPU attention needs unit stride
    clips = qkv.unflatten(0, (-1, frames)).unflatten(3, (3, num_heads, -1))  # (B, T, L, 3, H, D)
    outs = []
    for clip in clips.unbind(0):  # with at most four dimensions the fused CPU attention reads strided views
        q, k, v = clip.permute(2, 1, 3, 0, 4).unbind(0)  # each (L, H, T, D)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        outs.append(F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2))  # (T, L, C)
    return torch.cat(outs) if outs else qkv[:, :, : qkv.shape[2] // 3].clone()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of channels (2i, 2i+1) of frame t by angles[t, i];  x (..., T, D), angles (T, D/2)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.to(wide).cos(), angles.to(wide).sin()
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
