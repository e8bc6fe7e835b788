"""What options mean that several commands have."""

from pathlib import Path

import pytest
import torch

from mdm_models import cli
from mdm_models.commands.line import device_of, dtype_of, exit_code, paragraphs, parse
from mdm_models.commands.sample import Options


def test_no_dtype_is_bfloat16_on_a_gpu_and_left_to_the_pipeline_on_a_cpu():
    assert dtype_of(None, torch.device("cuda")) == torch.bfloat16
    assert dtype_of(None, torch.device("cpu")) is None
    assert dtype_of("fp32", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("error", [RuntimeError("Found no NVIDIA driver"), AssertionError("not built with CUDA")])
def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch, error):
    def empty(*size, device):
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=f"--device cuda: {error}"):
        device_of("cuda")


def test_a_device_of_no_kind_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--device gpu: Expected one of cpu, cuda"):
        device_of("gpu")


def test_what_follows_a_block_of_a_help_text_is_a_paragraph_of_its_own():
    table = "It prints\n  fid   a distance\n  loss  the loss\n"
    given = f"{table}Smaller is better. The line\n`protocol` says when.\n\nEnd\nof it.\n"
    shown = f"{table}\nSmaller is better. The line `protocol` says when.\n\nEnd of it.\n"
    assert paragraphs(given) == shown


@pytest.mark.parametrize("command", [["evaluate"], ["prepare", "folder"]])
def test_the_help_of_a_command_joins_no_sentence_to_its_table(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    begins = {"evaluate": "Distances shrink", "prepare": "If folders say"}[command[0]]
    assert f"\n\n{begins}" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--out=~/a cat"], ["--out", "~/a cat"]])
def test_a_home_that_the_shell_left_is_the_users(given, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse("mdm sample", None, Options, ["~/model", "a ~/ cat", *given]) == Options(
        model=Path("/home/ada/model"), prompts=("a ~/ cat",), out=Path("/home/ada/a cat")
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda folder: (folder / "file").mkdir(exist_ok=True), "file: there is a file where a folder is needed; give"),
        (lambda folder: (folder / "file/in").write_text(""), "file/in: a file stands where one of its folders should"),
        (lambda folder: folder.read_bytes(), ": there is a folder where a file is needed; give the path of a file"),
    ],
)
def test_a_file_in_a_folders_place_is_told_with_the_remedy(act, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert exit_code("mdm", lambda: act(tmp_path)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mdm: error: {tmp_path}")
    assert message in line
