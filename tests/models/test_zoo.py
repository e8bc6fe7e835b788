"""The named models."""

import dataclasses
import math

import pytest
import torch

from mdm_models import create_model, list_models, model_config


def test_unknown_model_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'mdm_t2i_64'"):
        create_model("mdm_t2i_46")


def test_unknown_override_is_named():
    with pytest.raises(ValueError, match="unknown model options widths"):
        create_model("mdm_t2i_tiny", widths=3)


def test_models_are_listed_by_wildcard():
    assert list_models("mdm_t2v_*") == ["mdm_t2v_256", "mdm_t2v_64", "mdm_t2v_emoji", "mdm_t2v_tiny"]


def test_text_width_reaches_the_innermost_unet():
    assert model_config("mdm_t2v_tiny", context_dim=16).innermost.context_dim == 16


def test_video_levels_and_their_noise_scales():
    config = model_config("mdm_t2v_256")
    assert config.strides == [(1, 1), (1, 4), (16, 4)]
    assert config.scales == [16.0, 4.0, 1.0]


def test_strides_and_noise_scales_of_chained_time_levels():
    inner = model_config("mdm_t2v_tiny")
    config = dataclasses.replace(inner, channels=(32,) * 3, blocks=(1,) * 3, temporal_attention=(), inner=inner)
    assert config.strides == [(1, 1), (4, 1), (32, 1)]
    assert config.scales == [math.sqrt(32), math.sqrt(8), 1.0]


@pytest.mark.parametrize("name", list_models())
def test_every_model_can_be_built_without_memory(name):
    with torch.device("meta"):
        model = create_model(name)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
