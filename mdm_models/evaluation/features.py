"""What every network that gives features of images or clips looks like."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mdm_models.errors import one_line

IMAGES_AT_ONCE = 64  # of 299² float32: about 70 MB, and a few times that inside a network


class FeatureExtractor(nn.Module):
    """A network that maps images (N, 3, H, W) uint8 of any size to features (N, num_features) float32.

    metric: the name under which the Fréchet distance of these features is reported; name: the network's, as a part of
    such a name. A subclass defines `features` of a batch that is not empty.

    takes_clips: it takes clips (N, 3, T, H, W) in place of images; resizing: how it changes the size of what it sees.
    """

    takes_clips = False
    at_once = IMAGES_AT_ONCE
    resizing = "resized by itself"

    def __init__(self, name: str, network: nn.Module, num_features: int, metric: str = ""):
        super().__init__()
        self.name = name
        self.metric = metric or f"frechet_{name}"
        self.network = network
        self.num_features = num_features
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Give features (N, num_features) of 1 to `at_once` images (N, 3, H, W), or clips (N, 3, T, H, W), uint8."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Give features (N, num_features) float32 of any number of images or clips, uint8, `at_once` of them at a
        time."""
        if not len(images):
            return torch.zeros(0, self.num_features, device=images.device)
        return torch.cat([self.features(some).float() for some in images.split(self.at_once)])


@torch.no_grad()
def num_features_of(features: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> int:
    """Find how many numbers a network gives of a sample of this shape, for which it is asked of two black ones, uint8.

    Raises ValueError if it does not take them or gives something else.
    """
    kind, asked = "images" if len(shape) == 3 else "clips", (2, *shape)
    try:
        found = features(torch.zeros(asked, dtype=torch.uint8))
    except Exception as error:  # the code in a file can raise anything
        end = one_line(error)[-150:]  # where TorchScript says what happened
        raise ValueError(f"it does not take {kind} of shape {asked}: …{end}") from None
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"for two {kind} it gives {given}; it must give features of shape (2, D)")
    return found.shape[1]


@contextlib.contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Turn a missing package into a ValueError that says what to install."""
    try:
        yield
    except ImportError:
        raise ValueError(f"a package is missing: pip install {' '.join(packages)}") from None
