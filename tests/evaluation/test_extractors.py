"""The published InceptionV3 weights are not here: tests use random ones of their names and shapes."""

import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3

from mdm_models.evaluation.extractors import load_extractor
from tests.evaluation.conftest import MeanColour, noise
from tests.text.directories import MakesFile


class RandomInception(FeatureExtractorInceptionV3):
    """With the weights that its layers begin with."""

    def __init__(self):
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("inception-v3-compat", ["2048"], empty)

    def load_state_dict(self, state_dict):
        pass


class LikeNvidias(nn.Module):
    """Takes what NVIDIA's file takes; its features are the mean pixel."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        features = img.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048)
        return features if return_features else features[:, :1008]


class Flat(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> tuple[FeatureExtractorInceptionV3, Path]:
    """The network, and its state dict under the published name."""
    torch.manual_seed(0)
    network = RandomInception()
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_inceptions_weights_give_fid(inception):
    network, path = inception
    images = noise(2, 32)
    extractor = load_extractor(str(path), image_size=32)
    assert (extractor.metric, extractor.num_features) == ("fid", 2048)
    torch.testing.assert_close(extractor(images), network(images)[0])


def test_weights_in_the_old_format_are_read(inception, tmp_path):
    network, _ = inception
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    assert load_extractor(str(path), image_size=32).metric == "fid"


def test_nvidias_program_gives_fid_from_pixels_0_to_255(scripted):
    extractor = load_extractor(str(scripted(LikeNvidias(), "inception-2015-12-05.pt")), image_size=16)
    images = noise(3)
    assert extractor.metric == "fid"
    torch.testing.assert_close(extractor(images), images.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048))


def test_any_program_gives_a_distance_of_its_name_from_images_0_to_1(scripted):
    extractor = load_extractor(str(scripted(MeanColour(), "mean-colour.pt")), image_size=16)
    images = noise(100)  # more than go through at once
    assert (extractor.metric, extractor.num_features) == ("frechet_mean_colour", 3)
    torch.testing.assert_close(extractor(images), images.float().mean(dim=(2, 3)) / 255)


def test_an_exported_program_is_read(tmp_path):
    path = tmp_path / "mean_colour.pt2"
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(MeanColour(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    images = noise(3)
    extractor = load_extractor(str(path), image_size=16)
    torch.testing.assert_close(extractor(images), images.float().mean(dim=(2, 3)) / 255)


def test_efficientnet_takes_224_pixels_around_127():
    extractor = load_extractor("efficientnet-lite0", image_size=224)
    images = noise(2, 224)
    features = extractor(images)
    assert (features.shape, extractor.metric) == ((2, 1280), "frechet_efficientnet_lite0")
    with torch.no_grad():
        expected = extractor.network.extract_features((images.float() - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(features, expected)


def test_efficientnet_takes_images_of_any_size():
    assert load_extractor("efficientnet-lite0", image_size=16)(noise(2, 16)).shape == (2, 1280)


def test_a_path_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"nowhere.pth: there is no such file; .* efficientnet-lite0"):
        load_extractor("nowhere.pth", image_size=16)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a photograph", b"<html>not found</html>"])
def test_what_is_no_file_of_torch_is_refused_without_advice_to_run_it(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pth: it is no file of torch.*; download the weights anew$"):
        load_extractor(str(tmp_path / "weights.pth"), image_size=16)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"linear.pth: it holds no InceptionV3 weights"):
        load_extractor(str(tmp_path / "linear.pth"), image_size=16)


def test_incomplete_weights_are_refused(inception, tmp_path):
    network, _ = inception
    weights = network.state_dict()
    del weights["Conv2d_1a_3x3.conv.weight"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3.conv.weight"):
        load_extractor(str(tmp_path / "weights.pth"), image_size=16)


def test_a_file_that_is_none_of_torchs_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"weights.pth"):
        load_extractor(str(tmp_path / "weights.pth"), image_size=16)


def test_what_is_pickled_in_weights_is_not_run(tmp_path):
    torch.save({"Mixed_7c.branch_pool.conv.weight": MakesFile(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth"):
        load_extractor(str(tmp_path / "weights.pth"), image_size=16)
    assert not (tmp_path / "made").exists()


def test_a_program_that_gives_no_features_is_refused(scripted):
    with pytest.raises(ValueError, match=r"flat.pt: for two images it gives shape \(2, 16, 16\)"):
        load_extractor(str(scripted(Flat(), "flat.pt")), image_size=16)


def test_a_program_that_takes_no_images_is_refused(scripted):
    with pytest.raises(ValueError, match=r"linear.pt: it does not take images of shape \(2, 3, 16, 16\): .*multiplied"):
        load_extractor(str(scripted(nn.Linear(2, 2), "linear.pt")), image_size=16)


@pytest.mark.parametrize(
    ("module", "source", "package"),
    [
        ("efficientnet_lite_pytorch", "efficientnet-lite0", "efficientnet-lite-pytorch"),
        ("torch_fidelity", None, "torch-fidelity"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, inception, module, source, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_extractor(source or str(inception[1]), image_size=16)
