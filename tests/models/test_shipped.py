"""Models whose weights come with the package."""

import tomllib
from pathlib import Path

import pytest
import torch

import mdm_models
from mdm_models import Pipeline, cli, create_model, list_models, shipped
from tests.models.small_pipelines import save_as_shipped

LARGEST = 32e6  # bytes of the weights of one model, its text encoder's among them


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """The package's folder of weights, with one model in it."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    save_as_shipped(tmp_path / "weights", "mdm_t2i_tiny")
    return tmp_path / "weights"


def test_models_whose_weights_come_along_are_listed(weights, capsys):
    assert list_models(pretrained=True) == ["mdm_t2i_tiny"]
    assert list_models("mdm_t2v*", pretrained=True) == []
    assert cli.main(["models", "--pretrained"]) == 0
    assert capsys.readouterr().out == "mdm_t2i_tiny\n"


def test_a_model_is_created_with_its_weights_in_float32(weights):
    model = create_model("mdm_t2i_tiny", pretrained=True)
    saved = mdm_models.from_pretrained(weights / "mdm_t2i_tiny")
    assert not model.training
    for own, there in zip(model.state_dict().values(), saved.state_dict().values(), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, there.float(), rtol=0, atol=0)


def test_a_pretrained_model_takes_no_other_settings(weights):
    with pytest.raises(ValueError, match="num_heads: a pretrained model"):
        create_model("mdm_t2i_tiny", pretrained=True, num_heads=8)


def test_asking_for_weights_that_do_not_come_along_says_which_do_and_how_to_get_others(weights):
    with pytest.raises(
        ValueError, match=r"no weights of mdm_t2i_64 come .* only those of mdm_t2i_tiny: .* `mdm convert"
    ):
        create_model("mdm_t2i_64", pretrained=True)
    with pytest.raises(ValueError, match="no model named 'mdm_t2i_tony'; did you mean 'mdm_t2i_tiny'"):
        create_model("mdm_t2i_tony", pretrained=True)
    with pytest.raises(FileNotFoundError, match="no model of that name comes with"):
        mdm_models.from_pretrained("mdm_t2i_64")


def test_a_pipeline_is_opened_by_its_models_name(weights):
    pipeline = Pipeline.from_pretrained("mdm_t2i_tiny", dtype=torch.float32)
    picture = pipeline("a red apple", num_inference_steps=2, seed=0, progress=False)[0]
    assert picture.size == (16, 16)


def test_mdm_sample_takes_the_name(weights, tmp_path):
    where = ["--out", str(tmp_path / "apple.png"), "--device", "cpu"]
    assert cli.main(["sample", "mdm_t2i_tiny", "a red apple", "--steps", "2", *where]) == 0
    assert (tmp_path / "apple.png").exists()


def test_mdm_sample_says_which_names_there_are(weights, capsys):
    assert cli.main(["sample", "mdm_t2i_tony", "a red apple"]) == 2
    assert "mdm_t2i_tony: no such directory; models that come along: mdm_t2i_tiny" in capsys.readouterr().err


def test_a_directory_of_that_name_goes_before(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mdm_t2i_tiny").mkdir()
    assert shipped.shipped_or("mdm_t2i_tiny") == Path("mdm_t2i_tiny")


@pytest.mark.parametrize("name", ["", ".", "..", "weights"])
def test_what_is_no_name_of_a_model_stays_a_path(weights, name):
    assert shipped.shipped_or(name) == Path(name)


def test_the_wheel_has_every_file_of_the_weights_and_each_model_its_card_and_at_most_32_MB_of_weights():
    package = Path(mdm_models.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["mdm_models"]
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    for name in list_models(pretrained=True):
        files = {path for path in (shipped.FOLDER / name).rglob("*") if path.is_file()}
        assert files <= packed
        assert shipped.FOLDER / name / shipped.CARD in files
        assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= LARGEST
