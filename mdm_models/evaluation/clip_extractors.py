"""I3D, the video network behind the Fréchet video distance (Unterthiner et al. 2018, arXiv 1812.01717)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mdm_models.evaluation.features import FeatureExtractor, num_features_of

ARGUMENTS = {"rescale", "resize", "return_features"}  # of the published program


class I3D(FeatureExtractor):
    """The TorchScript of I3D, trained on Kinetics-400, that StyleGAN-V published and others compute FVD with,
    i3d_torchscript.pt: clips → the 400 numbers before its softmax.

    FVDs differ by how clips were prepared. Here all frames of a clip are seen, squeezed to 224², bilinear without
    antialiasing, with pixels in −1…1. Raises ValueError if the network does not take clips of so many frames.
    """

    takes_clips = True
    at_once = 4
    SIZE = 224
    resizing = f"resized to {SIZE}², bilinear"

    def __init__(self, network: nn.Module, frames: int):
        super().__init__("i3d", network, 0, metric="fvd")
        self.num_features = num_features_of(self.features, (3, frames, self.SIZE, self.SIZE))

    @staticmethod
    def recognises(network: torch.jit.ScriptModule) -> bool:
        """Whether a program has the arguments of the published one, by which that is told from others."""
        return {argument.name for argument in network.forward.schema.arguments} >= ARGUMENTS

    def features(self, clips: Tensor) -> Tensor:
        frames = rearrange(clips, "n c t h w -> (n t) c h w").float() / 127.5 - 1
        resized = F.interpolate(frames, (self.SIZE, self.SIZE), mode="bilinear")
        seen = rearrange(resized, "(n t) c h w -> n c t h w", n=len(clips))
        return self.network(seen, rescale=False, resize=False, return_features=True)


class ExportedClipExtractor(FeatureExtractor):
    """A network that somebody saved whole, with its own resizing and normalisation inside: clips (N, 3, T, H, W)
    float32 in 0…1 → features (N, D). Its distance is called fvd_NAME. It is asked once, with two clips.

    Raises ValueError if it does not take that or gives something else.
    """

    takes_clips = True
    at_once = 4

    def __init__(self, name: str, network: nn.Module, frames: int, image_size: int):
        super().__init__(name, network, 0, metric=f"fvd_{name}")
        self.num_features = num_features_of(self.features, (3, frames, image_size, image_size))

    def features(self, clips: Tensor) -> Tensor:
        return self.network(clips.float() / 255)
