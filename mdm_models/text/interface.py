"""What every text encoder looks like to a model, a pipeline or a trainer."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """Anything that reads prompts: encoder(prompts) → features (B, L, width) floating point, mask (B, L) bool, True
    where there is text.

    L is that of the longest prompt, at most `max_tokens`; features are 0 where the mask is False, as in the official
    code, whose cross-attention may look at padding. "" is a prompt like any other: its features are the unconditional
    ones that guidance needs. Encode prompts that are to share a batch in one call, so that they get the same L.
    """

    width: int
    max_tokens: int

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class EncoderIdentity:
    """Tells whether two text encoders give the same features. The name, where one was loaded from, is only for people:
    a copy in another folder is the same encoder."""

    name: str = field(compare=False)
    width: int
    max_tokens: int
    weights: str
    """digest of the weights, the same in float32 and bfloat16"""
    tokenizer: str = field(default="", compare=False)
    """digest of how it reads a text; empty: not known, as earlier versions did not keep it"""

    def fits(self, other: "EncoderIdentity") -> bool:
        """Whether the two give the same features, as far as both are known."""
        return self == other and (self.tokenizer == other.tokenizer or not (self.tokenizer and other.tokenizer))

    def __str__(self) -> str:
        tokenizer = f", tokenizer {self.tokenizer}" * bool(self.tokenizer)
        return f"{self.name} ({self.width} wide, at most {self.max_tokens} tokens, weights {self.weights}{tokenizer})"


def check_prompts(prompts: list[str]) -> None:
    """Raises TypeError unless `prompts` is a list of strings: a lone string would become a batch of letters."""
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts is a {type(prompts).__name__}; it must be a list of strings")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts holds {prompt!r}, a {type(prompt).__name__}; it must be a list of strings")


def up_to_end(tokens: Tensor, end_token: int) -> Tensor:
    """Mark the tokens (B, S) up to the first end token of each row and on it: (B, S) bool; a row without one is all
    True."""
    is_end = tokens == end_token
    ends_before = is_end.cumsum(dim=1) - is_end.long()
    return ends_before == 0
