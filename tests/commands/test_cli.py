"""The command `mdm`."""

import contextlib
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import mdm_kernels
import mdm_models
from mdm_models import cli
from tests.models.test_pipeline import CLIPS, IMAGES, SIZE, pipeline_of


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pipeline_of(IMAGES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    pipeline_of(CLIPS).save_pretrained(folder)
    return folder


def sample(model, *arguments) -> int:
    return cli.main(["sample", str(model), *map(str, arguments), "--steps", "2"])


def test_help_names_every_command():
    shown = subprocess.run([sys.executable, "-m", "mdm_models.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(f"mdm {name}" in shown.stdout for name in cli.COMMANDS)


def test_models_lists_what_matches(capsys):
    assert cli.main(["models", "mdm_t2v_*"]) == 0
    assert capsys.readouterr().out.split() == ["mdm_t2v_256", "mdm_t2v_64", "mdm_t2v_emoji", "mdm_t2v_tiny"]
    assert cli.main(["models", "sd*"]) == 2


def test_sample_writes_a_picture_a_prompt_and_says_the_seed(image_model, tmp_path, capsys):
    assert sample(image_model, "a penguin", "an apple", "--out", tmp_path / "new") == 0
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["0000.png", "0001.png"]
    shown = capsys.readouterr().out
    assert "0001.png: an apple" in shown
    assert "seed " in shown


def test_a_seed_repeats_the_picture_and_overwrites_nothing(image_model, tmp_path):
    for _ in range(2):
        assert sample(image_model, "a penguin", "--out", tmp_path, "--seed", 3) == 0
    first, second = ((tmp_path / name).read_bytes() for name in ("0000.png", "0001.png"))
    assert first == second


def test_one_picture_goes_to_the_file_that_is_named(image_model, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 48), "green").save(photo)
    assert sample(image_model, "a penguin", "--image", photo, "--out", tmp_path / "out.webp") == 0
    with Image.open(tmp_path / "out.webp") as picture:
        assert picture.size == (SIZE, SIZE)


def test_clips_are_written_as_mp4_or_as_asked(clip_model, tmp_path):
    assert sample(clip_model, "a penguin", "--out", tmp_path) == 0
    assert sample(clip_model, "a penguin", "--out", tmp_path, "--format", "gif") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.mp4", "0001.gif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--format", "mp4"], "--format mp4: the model makes pictures"),
        (["a", "b", "--out", "one.png"], "one.png is one file and there will be 2 pictures"),
        (["a", "--out", "one.mp4"], "one.mp4: the model makes pictures"),
        (["a", "--image", "README.md"], "README.md is no picture"),
        (["a", "--sampler", "hein"], "did you mean 'heun'"),
        (["a", "--guidance-interval", "9", "3"], "guidance_interval"),
        (["a", "--count", "0"], "error: count is 0"),
        (["a", "--seed", "-1"], "seed is -1"),
        (["a", "--text-encoder", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(image_model, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "README.md").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    assert sample(image_model, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_run_is_sampled_from_the_model_that_it_left(image_model, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(image_model, tmp_path / "run" / "model")
    assert sample(tmp_path / "run", "a cat", "--out", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").exists()


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert sample(tmp_path / "none", "a") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_version_is_that_of_both_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"mdm {mdm_models.__version__}, torch ")
    assert mdm_models.__version__ == mdm_kernels.__version__


def test_a_command_that_is_not_there_gets_a_suggestion(capsys):
    assert cli.main(["tran"]) == 2
    assert capsys.readouterr().err == "mdm: error: no command is named 'tran'; did you mean 'train'?\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_its_name_in_its_usage(name, capsys):
    with contextlib.suppress(SystemExit):
        assert cli.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mdm {name} ")


EXTRAS = [("webdataset", "precompute", "train"), ("fsspec", "index", "train")]


@pytest.mark.parametrize(("missing", "name", "extra"), EXTRAS)
def test_a_missing_extra_is_one_line(missing, name, extra):
    program = f"import sys; sys.modules[{missing!r}] = None; from mdm_models import cli; sys.exit(cli.main([{name!r}]))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = f"mdm {name}: error: {missing} is not installed: pip install 'mdm-kernels[{extra}]'\n"
    assert (ran.returncode, ran.stderr) == (2, expected)


def test_ctrl_c_has_a_code_of_its_own(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mdm_models.commands.models.list_models", interrupted)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "mdm models: stopped; the same command goes on\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("mdm_models.commands.models.list_models", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["models"])
