"""Where the text of a row of tokens ends."""

from torch import Tensor


def up_to_end(tokens: Tensor, end_token: int) -> Tensor:
    """(B, S) → (B, S) bool: True up to the first end token of each row and on it; a row without one is all True."""
    is_end = tokens == end_token
    ends_before = is_end.cumsum(dim=1) - is_end.long()
    return ends_before == 0
