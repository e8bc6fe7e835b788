"""The Fréchet distance between the features of real and of sampled images or clips.

‖μ − μ'‖² + tr(Σ + Σ' − 2 (ΣΣ')^½), the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982), from
means and covariances in float64. It is biased upwards for few samples: compare only results of equally many.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from mdm_models.errors import one_line
from mdm_models.evaluation.features import FeatureExtractor
from mdm_models.storage import write_whole


class ClipFeatures(nn.Module):
    """Maps clips (N, 3, T, H, W) uint8 to features (N, 2·D) float32, each clip's from the features (D) of its frames.

    The first half is their mean over the frames: what is seen. The second is the mean absolute change from one frame to
    the next: how it moves. The mean alone would not notice frames that are shuffled or frozen; all frames side by side,
    T·D numbers, would ask for more clips than anybody samples to estimate their covariance. This is not the FVD of the
    literature, whose features are a video network's: see `I3D`.
    """

    def __init__(self, frames: FeatureExtractor):
        super().__init__()
        self.frames = frames
        self.name, self.metric = frames.name, f"frechet_video_{frames.name}"
        self.num_features = 2 * frames.num_features

    def forward(self, clips: Tensor) -> Tensor:
        of_frames = self.frames(rearrange(clips, "n c t h w -> (n t) c h w"))
        features = rearrange(of_frames, "(n t) d -> n t d", n=len(clips))
        return torch.cat([features.mean(dim=1), features.diff(dim=1).abs().mean(dim=1)], dim=1)


class _Features(nn.Identity):
    """Stands for the network where features are given in place of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class FrechetDistance:
    """Measures the Fréchet distance of real and sampled images (N, 3, H, W) or clips (N, 3, T, H, W), uint8, in any
    order.

    The statistics of what is real stay when those of what was sampled start anew: from then on, or once they were
    loaded, `has_reference` says that no more need be added. In a distributed run every rank adds its share and calls
    the same methods; results are those of all shares together.
    """

    def __init__(self, extractor: FeatureExtractor, is_video: bool, device: torch.device):
        network = ClipFeatures(extractor) if is_video and not extractor.takes_clips else extractor
        self.resizing = extractor.resizing
        self.name = network.metric
        self.width = network.num_features
        self.has_reference = False
        self._network = network.to(device)
        self._statistics = FrechetInceptionDistance(_Features(self.width), reset_real_features=False).to(device)

    def add_real(self, images: Tensor) -> Tensor:
        """Add real images or clips, uint8; → their features (N, D)."""
        features = self._network(images)
        self._statistics.update(features, real=True)
        return features

    def add_sampled(self, images: Tensor) -> Tensor:
        """Add sampled images or clips, uint8; → their features (N, D)."""
        features = self._network(images)
        self._statistics.update(features, real=False)
        return features

    def compute(self) -> float:
        """Give the distance over what has been added, at least 2 real and 2 sampled; sampled ones are forgotten."""
        self.has_reference = True
        distance = self._statistics.compute().item()
        self._statistics.reset()
        return distance

    def save_reference(self, path: Path, is_main: bool, features: Tensor | None = None) -> None:
        """Write the statistics of what is real, once, by the leading process: an .npz of mu (D,) and sigma (D, D) in
        float64, as FID tools do, and, if they are given, the features (N, D) that they are of. All ranks call it."""
        with self._statistics.sync_context():
            count = self._statistics.real_features_num_samples.item()
            total, squares = self._statistics.real_features_sum.cpu(), self._statistics.real_features_cov_sum.cpu()
        mean = total / count
        covariance = (squares - count * torch.outer(mean, mean)) / (count - 1)
        arrays = {"mu": mean.numpy(), "sigma": covariance.numpy(), "metric": self.name}
        if features is not None:
            arrays["features"] = features.cpu().numpy()
        if is_main:

            def write(partial: Path) -> None:
                with partial.open("wb") as file:  # given a path, numpy would append .npz
                    np.savez(file, **arrays)

            write_whole(path, write)

    def load_reference(self, path: Path, is_main: bool) -> Tensor | None:
        """Take the statistics of what is real from an .npz with mu and sigma, of `save_reference` or another tool.
        → the features (N, D) that are kept with them, if any are.

        All ranks call it; the leading one holds them, since shares are added up. Raises ValueError in one line if they
        are of another network.
        """
        mean, covariance, features = self._read_reference(path)
        self.has_reference = True
        if is_main:
            count = 2  # any number gives the same mean and covariance back
            statistics = self._statistics
            statistics.real_features_num_samples.fill_(count)
            statistics.real_features_sum.copy_(count * mean)
            statistics.real_features_cov_sum.copy_((count - 1) * covariance + count * torch.outer(mean, mean))
        return features

    def _read_reference(self, path: Path) -> tuple[Tensor, Tensor, Tensor | None]:
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
                metric = str(file["metric"]) if "metric" in file else self.name
                features = torch.from_numpy(file["features"]) if "features" in file else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"reference statistics {path}: not an .npz with mu and sigma: {one_line(error)}") from None
        if metric != self.name:
            raise ValueError(f"reference statistics {path} are those of {metric}; here it is {self.name}")
        if mean.shape != (self.width,) or covariance.shape != (self.width, self.width):
            raise ValueError(
                f"reference statistics {path}: mu has shape {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; "
                f"{self.name} needs ({self.width},) and ({self.width}, {self.width})"
            )
        if features is not None and (features.dim() != 2 or features.shape[1] != self.width):
            found = tuple(features.shape)
            raise ValueError(f"reference statistics {path}: features has shape {found}; it must be (N, {self.width})")
        return mean.double(), covariance.double(), features
