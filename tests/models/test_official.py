import argparse
import io
import zipfile

import pytest
import torch

from mdm_models import create_model, list_models, official
from tests.models.golden import shapes_of

PARAMETERS = {"mdm_t2i_64": 461_359_107, "mdm_t2i_256": 476_613_958, "mdm_t2i_1024": 480_970_057}


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_checkpoint_fits_tensor_by_tensor(name):
    with torch.device("meta"):
        own = create_model(name).state_dict()
    official_tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(name).items()}
    converted = official.state_dict_from_official(official_tensors)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in own.items()}
    assert sum(v.numel() for v in own.values()) == PARAMETERS[name]


@pytest.fixture
def tiny_checkpoint(tmp_path, monkeypatch):
    """A small model of the official layout, saved as the official code saves; and the weights it holds."""
    from mdm_models import zoo

    def mdm_small():
        from mdm_models import UNetConfig

        return UNetConfig(channels=(32,), blocks=(1,), attention=(1,), embed_dim=32, mid_blocks=True, context_dim=8)

    monkeypatch.setitem(zoo._CONFIGS, "mdm_small", mdm_small)
    model = create_model("mdm_small")
    pointwise = ("qkv.weight", "attention.0.proj.weight", "middle_blocks.1.proj.weight")
    names = {
        "time_embed.fc": "temb_layer", "text.pool.": "cond_emb.", "middle_blocks.0.": "mid_blocks.0.resnets.0.",
        "middle_blocks.1.": "mid_blocks.0.attn.0.", "middle_blocks.2.": "mid_blocks.1.resnets.0.",
        "down.": "down_blocks.", "up.": "up_blocks.", ".attention.": ".attn.", ".film.": ".time_layer.",
        ".skip.": ".conv3.", ".context_norm.": ".norm_cond.", ".context_kv.": ".kv_cond.", ".proj.": ".proj_out.",
    }  # fmt: skip
    saved = {}
    for key, value in model.state_dict().items():
        theirs = key
        for ours, name in names.items():
            theirs = theirs.replace(ours, name)
        saved[theirs] = value[..., None, None] if key.endswith(pointwise) else value
    path = tmp_path / "vis_model.pth"
    torch.save({"state_dict": saved, "args": argparse.Namespace(lr=1e-4), "batch_num": 7}, path)
    return path, model.state_dict()


def test_checkpoint_file_loads_with_its_weights(tiny_checkpoint):
    path, weights = tiny_checkpoint
    loaded = official.load_checkpoint(path, "mdm_small").state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_checkpoint_of_another_model_is_refused(tiny_checkpoint):
    path, _ = tiny_checkpoint
    with pytest.raises(ValueError, match="another model than mdm_t2i_tiny"):
        official.load_checkpoint(path, "mdm_t2i_tiny")


def test_truncated_checkpoint_is_refused_in_one_line(tiny_checkpoint):
    path, _ = tiny_checkpoint
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a readable official checkpoint") as error:
        official.load_checkpoint(path, "mdm_small")
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_checkpoint_with_code_in_it_is_refused_unread(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "extra": Malicious()}, path)
    with pytest.raises(ValueError, match="not a readable official checkpoint"):
        official.load_checkpoint(path, "mdm_t2i_tiny")
    assert "ran" not in capsys.readouterr().out


def test_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="no 'state_dict'"):
        official.load_checkpoint(path, "mdm_t2i_tiny")
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("readme.txt", "hello")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a readable official checkpoint"):
        official.load_checkpoint(path, "mdm_t2i_tiny")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth: no such checkpoint"):
        official.load_checkpoint(tmp_path / "absent.pth", "mdm_t2i_tiny")


def test_unknown_model_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'mdm_t2i_64'"):
        create_model("mdm_t2i_46")


def test_unknown_override_is_named():
    with pytest.raises(ValueError, match="unknown model options widths"):
        create_model("mdm_t2i_tiny", widths=3)


def test_models_are_listed_by_wildcard():
    assert list_models("mdm_t2v_*") == ["mdm_t2v_256", "mdm_t2v_64", "mdm_t2v_tiny"]


def test_text_width_reaches_the_innermost_unet():
    with torch.device("meta"):
        model = create_model("mdm_t2v_tiny", context_dim=16)
    assert model.config.innermost.context_dim == 16


def test_video_levels_and_their_noise_scales():
    with torch.device("meta"):
        config = create_model("mdm_t2v_256").config
    assert config.strides == [(1, 1), (1, 4), (16, 4)]
    assert config.scales == [16.0, 4.0, 1.0]
