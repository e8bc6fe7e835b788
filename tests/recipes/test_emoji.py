"""The stages of recipes/emoji.py: each is nested in the next, on one CPU."""

import pytest
import torch

from mdm_models.config import UNetConfig
from mdm_models.training.config import TrainConfig, chunks_of
from mdm_models.unet import empty_model
from mdm_models.zoo import model_config


def architecture(config: TrainConfig) -> UNetConfig:
    return model_config(config.model.model)


@pytest.fixture
def stages(recipe) -> dict[str, TrainConfig]:
    return {name: preset(("shards.tar",), "run") for name, preset in recipe("emoji").PRESETS.items()}


@pytest.mark.parametrize("later", ["64", "8x32"])
def test_stage_one_is_the_innermost_of_the_later_stages_with_the_same_text_encoder(stages, later):
    assert architecture(stages[later]).innermost == architecture(stages["16"])
    for field in ("text_width", "text_layers", "text_tokens"):
        assert getattr(stages[later].model, field) == getattr(stages["16"].model, field)


def test_every_stage_sees_what_its_model_takes_and_trains_the_innermost_level_on_all_of_it(stages):
    for config in stages.values():
        shapes = architecture(config).sample_shapes(config.data.size)
        frames = shapes[0][1] if len(shapes[0]) == 4 else 1
        assert frames == config.data.frames
        assert architecture(config).innermost.context_dim == config.model.text_width
        assert config.objective.level_rows(32, len(shapes))[-1] == 32
        assert chunks_of(config.optimizer, 2)


@pytest.mark.parametrize("name", ["64", "8x32"])
def test_a_model_that_is_to_be_shipped_fits_into_31_mb_of_bfloat16(stages, name):
    model = empty_model(architecture(stages[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) * torch.bfloat16.itemsize < 31e6
