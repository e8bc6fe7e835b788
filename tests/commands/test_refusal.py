"""A wrong command line is answered in one line, which names what is wrong and where to read more, and with code 2."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import tyro

from mdm_models import cli
from mdm_models.commands.line import parse
from mdm_models.commands.sample import Options

TRAIN = ["train", "t2v_webvid", "--data", "a.tar", "--out", "run"]
RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAMS = {"emoji": "emoji.py", "demo": "demo.py", "emoji_report": "emoji_report.py", "fluent": "recipes/fluent.py"}


def refused(capsys, *arguments: str) -> str:
    """The one line that `mdm` prints."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    return line


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_every_command_names_an_option_that_it_has_not(name, capsys):
    assert refused(capsys, name, "--zz") == f"mdm {name}: error: --zz: no such option; see mdm {name} --help"


@pytest.mark.parametrize(("name", "program"), PROGRAMS.items())
def test_a_recipe_that_is_run_as_a_file_names_an_option_that_it_has_not(name, program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", "--zz"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().err == f"{program}: error: --zz: no such option; see {program} --help\n"


def test_a_subcommand_that_is_misspelt_is_named_whatever_follows_it(capsys):
    message = "mdm prepare: error: foldr: no such subcommand; did you mean folder? see mdm prepare --help"
    assert refused(capsys, "prepare", "foldr", "pictures", "--out", "shards") == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*TRAIN, "--lrr", "3"],
            "mdm train: error: --lrr: no such option; did you mean --lr? see mdm train t2v_webvid --help",
        ),
        ([*TRAIN, "--batch_sise=3"], "--batch-sise: no such option; did you mean --batch-size?"),
        (["train", "t2v_webvid", "--dta", "a.tar"], "--dta: no such option; did you mean --data?"),
        (["sample", "--stpes", "3", "MODEL", "a cat"], "--stpes: no such option; did you mean --steps?"),
        (["prepare", "captions", "a.tsv", "--theads", "3"], "--threads? see mdm prepare captions --help"),
        (["sample", "MODEL", "-o", "a.png"], "-o: no such option; see mdm sample --help"),
    ],
)
def test_an_option_that_is_misspelt_is_named_with_the_one_that_is_like_it(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "mdm sample: error: MODEL: must be given; see mdm sample --help"),
        (["prepare", "captions"], "LIST, --out: must be given; see mdm prepare captions --help"),
        (["train", "t2v_webvid"], "--out, --data: must be given; see mdm train t2v_webvid --help"),
        (["prepare"], "Expected one of {folder, captions, imagenet, emoji, fluent-emoji}; see mdm prepare --help"),
        (["sample", "MODEL", "a cat", "--steps"], "Missing value for argument '--steps'"),
    ],
)
def test_what_is_missing_is_named(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "MODEL", "a cat", "--count", "x"], "base 10: 'x'; expected --count INT; see mdm sample --help"),
        ([*TRAIN, "--lr", "x"], "--lr: could not convert string to float: 'x'; expected --lr FLOAT; see mdm train t2v"),
        (["sample", "MODEL", "a cat", "--threshold", "d"], "invalid choice 'd' for argument '--threshold'. Expected"),
        ([*TRAIN, "--preset", "huge"], "invalid choice 'huge' for argument '--preset'. Expected one of ('tiny', '64'"),
        (["prepare", "capts"], "capts: no such subcommand; did you mean captions? see mdm prepare --help"),
        (["prepare", "zz"], "zz: no such subcommand; known are folder, captions, imagenet, emoji, fluent-emoji; see"),
        (["models", "*", "b"], "Unrecognized options: b; see mdm models --help"),
        (["sample", "MODEL"], "mdm sample: error: give prompts, one or several, or a file of them by --prompts"),
        ([*TRAIN, "--batch-size", "0"], "error: batch_size is 0; it must be above 0"),
    ],
)
def test_a_value_that_is_wrong_is_named_with_what_is_right(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_a_long_value_is_not_broken_into_lines(capsys):
    value = "/".join(["folder"] * 25)
    assert f"'{value}'; expected --count INT" in refused(capsys, "sample", "MODEL", "a cat", "--count", value)


@pytest.mark.parametrize("width", [None, "60"])
def test_the_width_of_the_terminal_is_left_as_it_was(monkeypatch, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(ValueError, match="--zz"):
        parse("mdm sample", None, Options, ["--zz"])
    assert os.environ.get("COLUMNS") == width


@pytest.mark.parametrize("message", ["a reason", "Refused\n\na reason\n"])
def test_a_message_of_another_form_is_told_as_it_is(monkeypatch, message):
    def refuse(*_, args, **__):
        print(message, file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(tyro, "cli", refuse)
    with pytest.raises(ValueError, match=r"^a reason; see mdm sample --help$"):
        parse("mdm sample", None, Options, ["MODEL", "a cat"])
