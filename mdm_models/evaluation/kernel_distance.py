"""Distances of real and sampled images that assume no Gaussian: the maximum mean discrepancy of their features.

Unlike the Fréchet distance they are not biased by the number of samples (KID), or hardly (CMMD): few tell more.
"""

import torch
from torch import Tensor
from torchmetrics.aggregation import CatMetric

from mdm_models.evaluation.features import FeatureExtractor
from mdm_models.evaluation.vision_models import VisionModel

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as its authors and torch-fidelity have it
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
ROWS_AT_ONCE = 4096  # of a kernel's matrix


def kid(real: Tensor, sampled: Tensor) -> float:
    """Compute the kernel inception distance of features (N, D) and (M, D): MMD² with the kernel (x·y / D + 1)³,
    unbiased, the mean over SUBSETS random subsets of SUBSET_SIZE, or of as many as there are (Bińkowski et al. 2018,
    section 4)."""
    size = min(SUBSET_SIZE, len(real), len(sampled))
    rng = torch.Generator().manual_seed(0)

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=rng)[:size].to(x.device)].double()

    return sum(_unbiased(subset(real), subset(sampled)) for _ in range(SUBSETS)) / SUBSETS


def _unbiased(x: Tensor, y: Tensor) -> float:
    size = len(x)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
    return (within - 2 * xy.mean()).item()


def cmmd(real: Tensor, sampled: Tensor) -> float:
    """Compute 1000 · MMD² with a Gaussian kernel of σ = 10, of CLIP embeddings (N, D) and (M, D) of unit length
    (Jayasumana et al. 2024, arXiv 2401.09603, section 4; biased, as their code)."""
    return SCALE * (_mean_kernel(real, real) + _mean_kernel(sampled, sampled) - 2 * _mean_kernel(real, sampled))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    y = y.double()
    squares = (torch.cdist(rows.double(), y) ** 2 for rows in x.split(ROWS_AT_ONCE))
    return sum(torch.exp(-square / (2 * SIGMA**2)).sum().item() for square in squares) / (len(x) * len(y))


class KernelDistance:
    """Measures the distance between the features of real and of sampled images or clips: KID, or CMMD where CLIP sees
    images. In a distributed run every rank adds its share and calls the same methods; results are those of all shares
    together, the same on all."""

    def __init__(self, extractor: FeatureExtractor, is_video: bool, device: torch.device):
        of_clip = isinstance(extractor, VisionModel) and extractor.is_clip and not is_video
        own = f"kid_video_{extractor.name}" if is_video else f"kid_{extractor.name}"
        self._distance = cmmd if of_clip else kid
        self.name = extractor.kernel_metric if of_clip else "kid" if extractor.metric == "fid" and not is_video else own
        self._device = device
        self._reference: Tensor | None = None
        self._real, self._sampled = (CatMetric(nan_strategy="disable").to(device) for _ in range(2))

    def add_real(self, features: Tensor) -> None:
        """Add the features (N, D) of real samples."""
        self._real.update(features)

    def add_sampled(self, features: Tensor) -> None:
        """Add the features (N, D) of samples drawn."""
        self._sampled.update(features)

    def take_real(self, features: Tensor) -> None:
        """Take the features (N, D) of all ranks' real samples, the same on each, in place of those that are added."""
        self._reference = features.to(self._device)

    def real_features(self) -> Tensor:
        """Give the features (N, D) of all ranks' real samples."""
        return self._real.compute() if self._reference is None else self._reference

    def compute(self) -> float:
        """Give the distance over what has been added, at least 2 real and 2 sampled; sampled ones are forgotten."""
        distance = self._distance(self.real_features(), self._sampled.compute())
        self._sampled.reset()
        return distance
