"""DINOv2 and CLIP, small and with random weights, as extractors."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from mdm_models.evaluation.extractors import load_extractor
from mdm_models.evaluation.kernel_distance import KernelDistance
from tests.evaluation.conftest import noise

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def save(folder: Path, network, **size) -> Path:
    torch.manual_seed(0)
    network.save_pretrained(folder)
    how = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return folder


@pytest.fixture
def dinov2(tmp_path) -> Path:
    return save(tmp_path / "dino-small", Dinov2Model(Dinov2Config(**SMALL)), crop_size={"height": 28, "width": 28})


@pytest.fixture
def clip(tmp_path) -> Path:
    network = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=8))
    return save(tmp_path / "clip-small", network, size={"shortest_edge": 28})


def test_features_of_dinov2_are_its_class_token(dinov2):
    extractor = load_extractor(str(dinov2), 28)
    images = noise(3, size=28)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
    tokens = Dinov2Model.from_pretrained(dinov2).eval()((images / 255 - mean) / std).last_hidden_state
    torch.testing.assert_close(extractor(images), tokens[:, 0])
    assert extractor.metric == "frechet_dino_small"  # not ViT-L, of the paper


def test_features_of_clip_are_embeddings_of_unit_length_with_a_distance_of_their_own(clip):
    extractor = load_extractor(str(clip), 16)
    features = extractor(noise(3, size=16))
    assert features.shape == (3, extractor.num_features) == (3, 8)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert KernelDistance(extractor, False, torch.device("cpu")).name == "cmmd_clip_small"


def test_images_of_any_size_are_brought_to_the_models(dinov2):
    extractor = load_extractor(str(dinov2), 28)
    plain = torch.full((1, 3, 50, 50), 77, dtype=torch.uint8)
    torch.testing.assert_close(extractor(plain), extractor(plain[..., :28, :28]), rtol=1e-4, atol=1e-4)


def test_a_directory_of_another_model_is_refused_in_one_line(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="its model is bert; known are dinov2 and clip") as error:
        load_extractor(str(tmp_path), 28)
    assert str(error.value).startswith(f"feature extractor {tmp_path}: ")
