"""Checkpoints of the port to diffusers."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from mdm_models import from_pretrained, model_config, zoo
from mdm_models.commands import convert
from mdm_models.diffusers_port import state_dict_from_port
from mdm_models.unet import empty_model
from tests.models.golden import DIRECTORY, GoldenModel, drawn_weights, read, relative_error

SHAPES = json.loads((DIRECTORY / "port_shapes.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_full_size_model_fits_tensor_by_tensor(name):
    own = {key: tensor.shape for key, tensor in empty_model(model_config(name)).state_dict().items()}
    theirs = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name].items()}
    assert {key: tensor.shape for key, tensor in state_dict_from_port(theirs).items()} == own


def test_every_tensor_is_taken_over_once():
    keys = {key: torch.tensor(i) for i, key in enumerate(SHAPES["mdm_t2i_1024"])}
    assert sorted(int(tensor) for tensor in state_dict_from_port(keys).values()) == list(range(len(keys)))


def test_attention_layers_are_counted_through_their_stage():
    converted = state_dict_from_port({key: torch.zeros(()) for key in SHAPES["mdm_t2i_64"]})
    layers = {int(found[1]) for key in converted if (found := re.match(r"up\.0\.attention\.(\d+)\.", key))}
    assert layers == set(range(15))  # 3 residual blocks, 5 layers after each


def test_folder_of_the_port_converts_to_a_model_with_its_outputs(tmp_path, monkeypatch):
    golden = GoldenModel("port_unet")
    monkeypatch.setitem(zoo._CONFIGS, "mdm_port", lambda: golden.config)
    folder = tmp_path / "unet" / "nesting_level_0"
    folder.mkdir(parents=True)
    metadata, _ = read("port_unet")
    save_file(drawn_weights(json.loads(metadata["shapes"])), folder / "diffusion_pytorch_model.safetensors")
    assert convert.main([str(folder), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        (output,) = from_pretrained(tmp_path / "out")(golden.x, **golden.inputs)
    assert relative_error(output, golden.y[0]) <= 1e-5
