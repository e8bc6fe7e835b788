"""`mdm convert`: a checkpoint becomes a model with the official outputs, or one line of error."""

import re

import pytest
import torch
from safetensors.torch import save_file

from mdm_models import create_model, from_pretrained, list_models, zoo
from mdm_models.commands import convert
from mdm_models.official import named_config
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder, load_text_encoder
from tests.models.golden import relative_error


def converted(*arguments) -> int:
    return convert.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    """The one line that a refused conversion prints."""
    assert converted(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_converted_checkpoint_gives_the_official_outputs(official_checkpoint, tmp_path, capsys):
    assert converted(official_checkpoint.path, tmp_path / "out") == 0
    assert "writing mdm_golden, 1,140,675 parameters" in capsys.readouterr().out
    golden = official_checkpoint.golden
    with torch.no_grad():
        (output,) = from_pretrained(tmp_path / "out")(golden.x, **golden.inputs)
    assert relative_error(output, golden.y[0]) <= 1e-5


def test_converted_checkpoint_is_a_pipeline_with_the_official_settings(official_checkpoint, tmp_path):
    converted(official_checkpoint.path, tmp_path)
    config = PipelineConfig.load(tmp_path)
    assert config.size == dict(official_checkpoint.golden.config.micro)["scale"]
    assert (config.text_encoder, config.shift_power) == ("google/flan-t5-xl", 1.0)


def test_checkpoint_that_is_no_named_model_is_refused_with_the_nearest(official_checkpoint, tmp_path, capsys):
    checkpoint = torch.load(official_checkpoint.path, weights_only=False)
    checkpoint["state_dict"].pop("conv_in.bias")
    torch.save(checkpoint, official_checkpoint.path)
    line = error_of(capsys, official_checkpoint.path, tmp_path / "out")
    assert line.endswith("the nearest is mdm_golden, from which 1 names or shapes of tensors differ, as conv_in.bias")
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_model_than_named_is_refused(official_checkpoint, tmp_path, capsys):
    line = error_of(capsys, official_checkpoint.path, tmp_path / "out", "--model", "mdm_t2i_tiny")
    assert "is of another model: it lacks" in line
    assert not (tmp_path / "out").exists()


def test_unknown_model_name_gets_a_suggestion(official_checkpoint, tmp_path, capsys):
    line = error_of(capsys, official_checkpoint.path, tmp_path / "out", "--model", "mdm_golde")
    assert "did you mean 'mdm_golden'" in line


def test_model_that_is_there_is_replaced_only_by_force(official_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    create_model("mdm_t2i_tiny").save_pretrained(out)
    assert "pass --force" in error_of(capsys, official_checkpoint.path, out)
    assert from_pretrained(out).config == create_model("mdm_t2i_tiny").config
    assert converted(official_checkpoint.path, out, "--force") == 0
    assert from_pretrained(out).config == official_checkpoint.golden.config


def test_damaged_checkpoint_is_refused_and_nothing_written(official_checkpoint, tmp_path, capsys):
    path = official_checkpoint.path
    path.write_bytes(path.read_bytes()[:-1000])
    assert "vis_model.pth is no checkpoint of torch.save, or not all of one" in error_of(capsys, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_refused(official_checkpoint, tmp_path, capsys):
    checkpoint = torch.load(official_checkpoint.path, weights_only=False)
    checkpoint["state_dict"]["conv_in.bias"][0] = float("nan")
    torch.save(checkpoint, official_checkpoint.path)
    assert "holds infinities or NaN, as in conv_in.bias" in error_of(capsys, official_checkpoint.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_model_that_was_there(official_checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    create_model("mdm_t2i_tiny").save_pretrained(out)
    before = [(path, path.read_bytes()) for path in sorted(out.iterdir())]

    def full(self, directory) -> None:
        raise OSError(28, "No space left on device", str(directory / "pipeline.json"))

    monkeypatch.setattr(PipelineConfig, "save", full)
    assert "No space left on device: '" in error_of(capsys, official_checkpoint.path, out, "--force")
    assert [(path, path.read_bytes()) for path in sorted(out.iterdir())] == before


def test_missing_checkpoint_is_named(tmp_path, capsys):
    assert "absent.pth: no such checkpoint" in error_of(capsys, tmp_path / "absent.pth", tmp_path / "out")


def test_folder_without_a_model_is_refused(tmp_path, capsys):
    assert "it has no diffusion_pytorch_model.safetensors" in error_of(capsys, tmp_path, tmp_path / "out")


def test_repository_of_the_port_has_its_models_listed(tmp_path, capsys):
    for level in (0, 1):
        folder = tmp_path / "unet" / f"nesting_level_{level}"
        folder.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    line = error_of(capsys, tmp_path, tmp_path / "out")
    assert "unet/nesting_level_0, " in line
    assert line.endswith("unet/nesting_level_1")


def test_truncated_weights_of_the_port_are_refused(tmp_path, capsys):
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20)
    assert "is not a whole .safetensors file" in error_of(capsys, tmp_path, tmp_path / "out")


def test_help_explains_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        converted("--help")
    assert "mdm convert vis_model_256x256.pth" in capsys.readouterr().out


@pytest.mark.parametrize("name", list_models())
def test_every_named_model_is_converted_to_a_pipeline_that_fits_it(name, tmp_path):
    config = named_config(name)
    sampling = convert._sampling(name, config)
    sampling.save(tmp_path)
    assert PipelineConfig.load(tmp_path) == sampling
    assert config.sample_shapes(sampling.size)[0][-1] == sampling.size
    assert not name.rpartition("_")[2].isdecimal() or name.endswith(f"_{sampling.size}")
    if sampling.text_encoder == "google/flan-t5-xl":
        assert config.innermost.context_dim == 2048
    elif sampling.text_encoder:
        assert load_text_encoder(sampling.text_encoder).width == config.innermost.context_dim
    else:
        assert "tiny" in name or "emoji" in name


def test_a_class_conditional_model_is_sampled_by_the_number_of_a_class(official_checkpoint, tmp_path, monkeypatch):
    golden = official_checkpoint.golden
    monkeypatch.setitem(zoo._CONFIGS, "mdm_c2i_golden", zoo._CONFIGS.pop("mdm_golden"))
    assert converted(official_checkpoint.path, tmp_path / "out") == 0
    pipeline = Pipeline.from_pretrained(tmp_path / "out")
    assert pipeline.text_encoder.width == golden.config.innermost.context_dim
    how = {"num_inference_steps": 1, "seed": 0, "output_type": "pt", "progress": False}
    assert not torch.equal(pipeline("3", **how), pipeline("4", **how))


OFFICIAL_NAMES = [  # ours → theirs, the inverse of what conversion does, for models without clips
    (r"\binner\.", "inner_unet."),
    (r"\btime_embed\.fc(\d)\.", r"temb_layer\1."),
    (r"\bmicro_embed\.(\w+)\.fc1\.", r"cond_layers.\1.0."),
    (r"\bmicro_embed\.(\w+)\.fc2\.", r"cond_layers.\1.1."),
    (r"\btext\.pool\.", "cond_emb."),
    (r"\.ffn_norm\.", ".ffn.0."),
    (r"\.ffn\.fc1\.", ".ffn.1."),
    (r"\.ffn\.fc2\.", ".ffn.3."),
    (r"\bmiddle_blocks\.0\.", "mid_blocks.0.resnets.0."),
    (r"\bmiddle_blocks\.1\.", "mid_blocks.0.attn.0."),
    (r"\bmiddle_blocks\.2\.", "mid_blocks.1.resnets.0."),
    (r"\b(down|up)\.", r"\1_blocks."),
    (r"\.attention\.", ".attn."),
    (r"\.resample\.conv\.", ".resample."),
    (r"\.film\.", ".time_layer."),
    (r"\.skip\.", ".conv3."),
    (r"\.context_norm\.", ".norm_cond."),
    (r"\.context_kv\.", ".kv_cond."),
    (r"\.proj\.", ".proj_out."),
]


def official_name(key: str) -> str:
    for ours, theirs in OFFICIAL_NAMES:
        key = re.sub(ours, theirs, key)
    return key


@pytest.mark.parametrize("name", ["mdm_t2i_tiny_64", "mdm_t2i_emoji_64"])
def test_a_named_model_comes_back_as_it_was_converted(name, tmp_path):
    model = create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero too
            parameter.normal_(std=0.05)
    torch.save({"state_dict": {official_name(k): v for k, v in model.state_dict().items()}}, tmp_path / "vis_model.pth")
    assert converted(tmp_path / "vis_model.pth", tmp_path / "out", "--model", name) == 0
    text = TransformerTextEncoder(model.config.innermost.context_dim, 1, max_tokens=8)
    pipeline = Pipeline.from_pretrained(tmp_path / "out", text_encoder=text)
    assert pipeline.config.size == 64
    x = [torch.randn(1, *shape) for shape in pipeline.shapes]
    context, mask = text(["a cat"])
    with torch.no_grad():
        found, expected = (one(x, torch.tensor([9]), context, mask) for one in (pipeline.model, model))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
