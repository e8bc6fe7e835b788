"""What every network that gives features of images looks like."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

IMAGES_AT_ONCE = 64  # of 299² float32: about 70 MB, and a few times that inside a network


class FeatureExtractor(nn.Module):
    """Images (N, 3, H, W) uint8 of any size → features (N, num_features) float32.

    metric: the name under which the Fréchet distance of these features is reported; name: the network's, as a part of
    such a name. A subclass defines `features` of a batch that is not empty.
    """

    def __init__(self, name: str, network: nn.Module, num_features: int, metric: str = ""):
        super().__init__()
        self.name = name
        self.metric = metric or f"frechet_{name}"
        self.network = network
        self.num_features = num_features
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.zeros(0, self.num_features, device=images.device)
        return torch.cat([self.features(some).float() for some in images.split(IMAGES_AT_ONCE)])


@contextlib.contextmanager
def needing(*packages: str) -> Iterator[None]:
    """Turn a missing package into a ValueError that says what to install."""
    try:
        yield
    except ImportError:
        raise ValueError(f"a package is missing: pip install {' '.join(packages)}") from None
