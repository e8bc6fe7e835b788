"""Does a sample show what was asked for? Whether, of a hundred real pictures, the nearest one is that of its caption.

Unlike a distance between distributions this needs few samples, and unlike CLIP score no network that knows the words: a
right picture of a caption is compared with pictures of all the others. What a perfect model would reach is below 1, as
drawings of one thing differ: the same figure of other real pictures of these things says how far one can get.
"""

import torch.nn.functional as F
from torch import Tensor


def nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """Rank a gallery (N, D) for each of the queries (Q, D) → (Q, N) int64: the gallery's numbers, nearest first.

    Nearness is the cosine after the gallery's mean was taken off, which all pictures have in common.
    """
    mean = gallery.mean(dim=0)
    cosines = F.normalize(queries - mean, dim=1) @ F.normalize(gallery - mean, dim=1).T
    return cosines.argsort(dim=1, descending=True, stable=True)


def share_right(queries: Tensor, gallery: Tensor, right: Tensor, among: int = 1) -> float:
    """The share of the queries with the right one among the `among` nearest of the gallery.

    right (Q,) int64: the number in the gallery of what each query should be. Raises ValueError if there are no queries
    or one is right for nothing in the gallery.
    """
    if not len(queries) or len(queries) != len(right):
        raise ValueError(
            f"there are {len(queries)} queries and {len(right)} right answers; give one each, at least one"
        )
    if not ((right >= 0) & (right < len(gallery))).all():
        raise ValueError(f"right is {right.tolist()}; the gallery has the numbers 0 to {len(gallery) - 1}")
    return (nearest(queries, gallery)[:, :among] == right[:, None]).any(dim=1).float().mean().item()
