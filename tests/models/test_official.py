"""Official checkpoints: what is in them, and files that only look like one."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from mdm_models import create_model, model_config, official, zoo
from tests.models.golden import GoldenModel, _per_frame, drawn_weights, read, relative_error, shapes_of

PARAMETERS = {"mdm_t2i_64": 461_359_107, "mdm_t2i_256": 476_613_958, "mdm_t2i_1024": 480_970_057}


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_checkpoint_fits_tensor_by_tensor(name):
    with torch.device("meta"):
        own = create_model(name).state_dict()
    official_tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(name).items()}
    converted = official.state_dict_from_official(official_tensors)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in own.items()}
    assert sum(v.numel() for v in own.values()) == PARAMETERS[name]


def test_checkpoint_gives_the_official_outputs(official_checkpoint):
    golden = official_checkpoint.golden
    model = official.load_checkpoint(official_checkpoint.path, official_checkpoint.name)
    with torch.no_grad():
        (output,) = model(golden.x, **golden.inputs)
    assert not model.training
    assert relative_error(output, golden.y[0]) <= 1e-5


def test_checkpoint_is_loaded_in_the_dtype_asked_for(official_checkpoint):
    model = official.load_checkpoint(official_checkpoint.path, official_checkpoint.name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_settings_of_official_classes_are_ignored_without_importing_them(official_checkpoint, monkeypatch):
    module = types.ModuleType("samplers")
    module.SamplerConfig = type("SamplerConfig", (), {"__module__": module.__name__})
    settings = argparse.Namespace(sampler_config=module.SamplerConfig(), loss=np.float64(0.5))
    settings.sampler_config.steps = [1, 2]
    checkpoint = torch.load(official_checkpoint.path, weights_only=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({**checkpoint, "args": settings}, official_checkpoint.path)
    weights = official.read_checkpoint(official_checkpoint.path)
    assert weights.keys() == checkpoint["state_dict"].keys()


def test_checkpoint_of_another_model_is_refused(official_checkpoint):
    with pytest.raises(ValueError, match=r"vis_model.pth is of another model: it lacks \d+ tensors, as "):
        official.load_checkpoint(official_checkpoint.path, "mdm_t2i_tiny")


def refusal(path) -> str:
    with pytest.raises(ValueError, match=path.name) as error:
        official.read_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, 0.5, 0.99, -1])
def test_truncated_checkpoint_is_refused_in_one_line(official_checkpoint, kept):
    path = official_checkpoint.path
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "no checkpoint of torch.save, or not all of one" in refusal(path)


def test_one_wrong_byte_in_the_weights_is_noticed(official_checkpoint):
    path = official_checkpoint.path
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert "is damaged: its record 'vis_model/data/" in refusal(path)


def test_a_web_page_in_place_of_the_file_is_refused(tmp_path):
    path = tmp_path / "vis_model.pth"
    path.write_text("<html>404 Not Found</html>")
    assert "no checkpoint of torch.save" in refusal(path)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [(os.system, "echo ran", "posix.system"), (eval, "print('ran')", "eval"), (print, "ran", "print")],
)
def test_checkpoint_that_would_run_code_is_refused_unrun(tmp_path, capfd, function, argument, name):
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "extra": Malicious(function, argument)}, path)
    assert f"{name}, which no official checkpoint has" in refusal(path)
    assert "ran" not in capfd.readouterr().out


def test_plain_pickle_that_would_run_code_is_refused_unrun(tmp_path, capfd):
    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps({"state_dict": {}, "extra": Malicious(os.system, "echo ran")}))
    refusal(path)
    torch.save({"extra": Malicious(os.system, "echo ran")}, path, _use_new_zipfile_serialization=False)
    refusal(path)
    assert "ran" not in capfd.readouterr().out


def test_a_function_under_an_official_name_is_not_called(tmp_path, monkeypatch, capfd):
    module = types.ModuleType("samplers")
    exec("def run():\n    print('ran')", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Malicious(module.run)}, path)
    official.read_checkpoint(path)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "content",
    [{"model": {}}, [1, 2], {"state_dict": {"step": 3}}, {"state_dict": {1: torch.zeros(1)}}, {"state_dict": None}],
)
def test_checkpoint_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert "no tensors under 'state_dict'" in refusal(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.eye(3).to_sparse(), "stored as torch.sparse_coo"), (torch.empty(3, device="meta"), "without values")],
)
def test_a_tensor_that_is_no_array_of_numbers_is_named(tmp_path, value, kind):
    torch.save({"state_dict": {"conv_in.weight": value}}, tmp_path / "odd.pth")
    assert f"its conv_in.weight is {kind}" in refusal(tmp_path / "odd.pth")


def changed(checkpoint, change):
    """The checkpoint with `change` of its state dict in its place."""
    content = torch.load(checkpoint.path, weights_only=False)
    torch.save({"state_dict": change(content["state_dict"])}, checkpoint.path)
    return checkpoint.path, checkpoint.name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_weights_of_a_wrapped_model_are_those_of_the_model(official_checkpoint, prefix):
    expected = official.load_checkpoint(official_checkpoint.path, official_checkpoint.name).state_dict()
    path, name = changed(official_checkpoint, lambda weights: {prefix + key: x for key, x in weights.items()})
    found = official.load_checkpoint(path, name).state_dict()
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_two_tensors_that_would_be_one_weight_are_named(official_checkpoint):
    path, name = changed(official_checkpoint, lambda weights: weights | {"module.conv_in.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"two tensors for the model's conv_in.bias, conv_in.bias and module.conv_in"):
        official.load_checkpoint(path, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(official_checkpoint, value):
    path, name = changed(official_checkpoint, lambda w: w | {"conv_in.bias": w["conv_in.bias"] + value})
    with pytest.raises(ValueError, match=r"vis_model.pth holds infinities or NaN, as in conv_in.bias"):
        official.load_checkpoint(path, name)


def test_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a readable checkpoint" in refusal(path)


def test_a_file_that_may_not_be_read_is_not_taken_for_a_damaged_one(official_checkpoint, monkeypatch):
    opened = io.open

    def refusing(file, *args, **options):
        if str(file) == str(official_checkpoint.path):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(io, "open", refusing)
    with pytest.raises(PermissionError, match=r"vis_model.pth"):
        official.read_checkpoint(official_checkpoint.path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such checkpoint"):
        official.load_checkpoint(tmp_path / "absent.pth", "mdm_t2i_tiny")


def test_group_norms_of_another_size_than_official_attention_has_are_refused():
    config = {
        "conditioning_feature_dim": 8,
        "resolution_channels": [64],
        "attention_levels": [0],
        "num_attention_layers": [1],
        "skip_mid_blocks": True,
        "resnet_config": {"num_groups_norm": 16},
    }
    with pytest.raises(ValueError, match="num_groups_norm is 16"):
        official.config_from_official(config)


@pytest.mark.parametrize("name", ["video_space_time4", "video_time4_time4", "video_time16_rotary"])
def test_video_checkpoint_loaded_by_name_gives_the_official_outputs(name, tmp_path, monkeypatch):
    golden = GoldenModel(name)
    monkeypatch.setitem(zoo._CONFIGS, "mdm_golden", lambda: _per_frame(golden.config))  # as the zoo has its own clips
    _, tensors = read(name)
    weights = {key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")}
    weights = weights or drawn_weights(json.loads(read(name)[0]["shapes"]))
    torch.save({"state_dict": weights}, tmp_path / "vis_model.pth")
    model = official.load_checkpoint(tmp_path / "vis_model.pth", "mdm_golden", dtype=torch.float32)
    assert model.config == golden.config
    with torch.no_grad():
        outputs = model(golden.x, **golden.inputs)
    for output, expected in zip(outputs, golden.y, strict=True):
        assert relative_error(output, expected) <= 1e-5


def test_every_video_level_of_a_named_model_sees_the_grid_of_the_official_code():
    levels = official.named_config("mdm_t2v_256").levels
    assert [level.adapters_see_grid for level in levels] == [True, True, False]  # the innermost has no adapters
    assert official.named_config("mdm_t2i_1024") == model_config("mdm_t2i_1024")


def test_a_number_of_frames_that_is_no_square_is_refused_by_the_config():
    tiny = model_config("mdm_t2v_tiny")  # 8 frames
    around = {"channels": (32, 32), "blocks": (1, 1), "temporal_attention": (), "kind": "space", "inner": tiny}
    with pytest.raises(ValueError, match=r"adapters_see_grid needs a square number of frames inside, .* not 8"):
        dataclasses.replace(tiny, adapters_see_grid=True, **around)
    assert dataclasses.replace(tiny, **around).inner == tiny
