"""Captions → tokens → features for cross-attention.

An encoder is an nn.Module with `tokenize(captions) → tokens (B, S) int64`, `forward(tokens) → features (B, S, width),
mask (B, S) bool` (True where there is text) and the attribute `width`. "" is a caption like any other: its start and
end tokens make the unconditional features that guidance needs.
"""

import functools

import torch
from torch import Tensor, nn

from mdm_models.layers import TextSelfAttention


@functools.cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer  # seconds to import

    return SimpleTokenizer()


class TransformerTextEncoder(nn.Module):
    """A small transformer over open_clip's byte-pair tokens, trained along with the model. Works offline.

    forward: tokens (B, S) int64, S ≤ max_tokens → features (B, S, width), mask (B, S) bool.
    """

    def __init__(self, width: int, layers: int = 4, num_heads: int = 8, max_tokens: int = 32):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width is {width}; it must be a multiple of num_heads {num_heads}")
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; a caption needs at least 3 with its start and end")
        self.width = width
        self.max_tokens = max_tokens
        self.end_token = _tokenizer().eot_token_id
        self.embedding = nn.Embedding(_tokenizer().vocab_size, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.layers = nn.ModuleList(TextSelfAttention(width, num_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def tokenize(self, captions: list[str]) -> Tensor:
        """(B,) captions → (B, max_tokens) int64: start, text, end, zeros. Long captions are cut before the end."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError("captions must be a list of strings")
        if not captions:
            return torch.zeros(0, self.max_tokens, dtype=torch.int64)
        return _tokenizer()(list(captions), self.max_tokens)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.mask(tokens)
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x), mask

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, S) bool, True up to the end token; padding has the number of "!", so it cannot be told by value."""
        ended = (tokens == self.end_token).cumsum(dim=1)
        return (ended == 0) | (tokens == self.end_token)
