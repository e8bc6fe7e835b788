"""A text encoder that is trained along with the model."""

import functools

import torch
from torch import Tensor, nn

from mdm_models.layers import TextSelfAttention
from mdm_models.text.interface import check_prompts
from mdm_models.text.tokens import up_to_end


@functools.cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer  # seconds to import

    return SimpleTokenizer()


class TransformerTextEncoder(nn.Module):
    """A small transformer over open_clip's byte-pair tokens, trained along with the model. Works offline.

    A `TextEncoder`, except that every prompt has max_tokens tokens; forward also takes the tokens (B, S) int64 that
    `tokenize` makes of the prompts, which is what data parallelism can hand to a replica.
    """

    def __init__(self, width: int, layers: int = 4, num_heads: int = 8, max_tokens: int = 32):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width is {width}; it must be a multiple of num_heads {num_heads}")
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; a prompt needs at least 3 with its start and end")
        self.width = width
        self.max_tokens = max_tokens
        self.end_token = _tokenizer().eot_token_id
        self.embedding = nn.Embedding(_tokenizer().vocab_size, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.layers = nn.ModuleList(TextSelfAttention(width, num_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B,) prompts → (B, max_tokens) int64: start, text, end, zeros. Long prompts are cut before the end."""
        check_prompts(prompts)
        if not prompts:
            return torch.zeros(0, self.max_tokens, dtype=torch.int64)
        return _tokenizer()(list(prompts), self.max_tokens)

    def forward(self, prompts: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenize(prompts).to(self.positions.device)
        mask = self.mask(tokens)
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).masked_fill(~mask[..., None], 0), mask

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, S) bool, True up to the end token; padding has the number of "!", so it cannot be told by value."""
        return up_to_end(tokens, self.end_token)
