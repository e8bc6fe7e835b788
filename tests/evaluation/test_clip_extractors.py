"""The published I3D is not here: a program with its arguments stands for it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdm_models.evaluation.extractors import load_extractor
from mdm_models.evaluation.frechet import FrechetDistance
from tests.evaluation.conftest import MeanColour, Motion, distance, noise

CPU = torch.device("cpu")


class LikeI3D(nn.Module):
    """Takes what the published program takes; its features are the mean colours of the frames."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale or resize or x.shape[1:] != [3, 4, 224, 224]:
            raise ValueError("it takes 4 frames of 224 x 224, prepared already")
        colours = x.mean(dim=(3, 4)).flatten(1)
        return colours if return_features else colours.softmax(1)


def test_i3d_gives_fvd_of_frames_of_224_pixels_in_minus_1_to_1(scripted):
    extractor = load_extractor(str(scripted(LikeI3D(), "i3d_torchscript.pt")), image_size=16, frames=4)
    assert (extractor.metric, extractor.num_features) == ("fvd", 12)
    colours = torch.randint(256, (5, 3, 4), dtype=torch.uint8)
    features = extractor(colours[..., None, None].expand(-1, -1, -1, 16, 16))
    torch.testing.assert_close(features, (colours.float() / 127.5 - 1).flatten(1), rtol=1e-5, atol=1e-5)
    assert FrechetDistance(extractor, is_video=True, device=CPU).name == "fvd"


def test_the_distance_of_clips_is_that_of_their_features_by_its_definition(scripted):
    extractor = load_extractor(str(scripted(Motion(), "motion.pt")), image_size=16, frames=4)
    measured = FrechetDistance(extractor, is_video=True, device=CPU)
    assert measured.name == "fvd_motion"
    real, sampled = noise(40, frames=4), noise(30, frames=4) // 2
    measured.add_real(real)
    measured.add_sampled(sampled)

    def features(clips: Tensor) -> np.ndarray:
        colours = clips.double().numpy().mean(axis=(3, 4)) / 255
        return np.concatenate([colours.mean(axis=2), np.diff(colours).mean(axis=2)], axis=1)

    assert measured.compute() == pytest.approx(distance(features(real), features(sampled)), rel=1e-4)


def test_a_network_of_images_sees_the_frames_of_clips(scripted):
    extractor = load_extractor(str(scripted(MeanColour(), "colours.pt")), image_size=16, frames=4)
    assert FrechetDistance(extractor, is_video=True, device=CPU).name == "frechet_video_colours"


@pytest.mark.parametrize(
    ("network", "frames", "message"),
    [
        (LikeI3D(), 8, r"does not take clips of shape \(2, 3, 8, 224, 224\): .*4 frames of 224"),
        (LikeI3D(), 1, r"does not take clips of shape \(2, 3, 1, 224, 224\)"),
        (nn.Conv3d(3, 1, 1), 4, r"for two clips it gives shape \(2, 1, 4, 16, 16\); .*; of frames, it does not take"),
        (Motion(), 1, "does not take images of shape"),
    ],
)
def test_a_network_that_takes_no_such_clips_is_refused(scripted, network, frames, message):
    path = scripted(network, "network.pt")
    with pytest.raises(ValueError, match="network.pt: .*" + message):
        load_extractor(str(path), image_size=16, frames=frames)
