"""The InceptionV3 of 2015 behind the Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500).

It is TensorFlow's network of inception-2015-12-05.tgz, not torchvision's, in the two forms in which it is passed
around. Both resize to 299² bilinearly as TensorFlow 1 did: corners at pixel centres' left ends and no antialiasing, so
that a large picture is sampled sparsely. That is what published FIDs were computed with; resizing any other way moves
the result (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"). torchmetrics' own
default antialiases and is not used here.
"""

import io
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdm_models.evaluation.features import FeatureExtractor, needing

POOLED = 2048  # width of the last pooling layer, whose features are compared
RESIZING = "resized to 299² as TensorFlow 1 did"


class InceptionV3(FeatureExtractor):
    """FID's InceptionV3 of a state dict as pytorch-fid and torch-fidelity publish it, in torch-fidelity's network.

    Raises ValueError if it is not one.
    """

    resizing = RESIZING

    def __init__(self, state_dict: Mapping[str, Tensor]):
        with needing("torch-fidelity"):
            from torch_fidelity import FeatureExtractorInceptionV3
        if not isinstance(state_dict, Mapping) or "Mixed_7c.branch_pool.conv.weight" not in state_dict:
            raise ValueError("it holds no InceptionV3 weights of FID; give another network as TorchScript")
        file = io.BytesIO()  # it takes only a file, and unpickles it: hand it one that is known to be harmless
        torch.save(dict(state_dict), file)
        file.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(POOLED)], file)
        super().__init__("inception", network, POOLED, metric="fid")

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


class ScriptedInceptionV3(FeatureExtractor):
    """NVIDIA's TorchScript of FID's InceptionV3, used by the FID of StyleGAN3 and EDM; it takes pixels 0…255 and
    resizes."""

    resizing = RESIZING

    def __init__(self, network: nn.Module):
        super().__init__("inception", network, POOLED, metric="fid")

    @staticmethod
    def recognises(network: torch.jit.ScriptModule) -> bool:
        """Whether a program can return features rather than classes, by which this one is told from other programs."""
        return any(argument.name == "return_features" for argument in network.forward.schema.arguments)

    def features(self, images: Tensor) -> Tensor:
        return self.network(images, return_features=True)
