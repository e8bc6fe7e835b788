"""What commands say, in one line, of what they cannot do, and what they find where a user points."""

import json
import os
import tarfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from mdm_models import cli, from_pretrained
from mdm_models.data.prepare.folder import ShardFolder
from mdm_models.errors import TrainingError
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.storage import check_local, naming, write_whole
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.config import changed
from mdm_models.training.monitor.logbook import records_of
from mdm_models.training.settings import check_paths
from mdm_models.training.trainer import train
from mdm_models.unet import build_model
from tests.training.models import NESTED_MODEL, settings
from tests.training.monitor.test_logbook import open_book  # noqa: F401 (a fixture)

URL = "s3://bucket/run"


def error_of(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert cli.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err.splitlines()[-1]  # behind progress bars


@pytest.fixture
def saved(tmp_path) -> Path:
    """RUN/model, as a training leaves it."""
    torch.manual_seed(0)
    pipeline = Pipeline(build_model(NESTED_MODEL), TransformerTextEncoder(32, 1, max_tokens=8), PipelineConfig(size=16))
    pipeline.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    return tmp_path / "run"


# URLs where a path is meant


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "emoji", "--data", "x.tar", "--out", "x", "--cache", URL),
        ("train", "emoji", "--data", "x.tar", "--out", "x", "--prometheus", URL),
        ("sample", "x", "a cat", "--out", URL),
        ("web", URL),
        ("sample", "x", "a cat", "--image", "https://host/a.png"),
        ("evaluate", "x", "--data", "x.tar", "--save-samples", URL),
        ("evaluate", "x", "--data", "x.tar", "--json", URL),
        ("convert", "x.pth", URL),
        ("convert", "gs://bucket/x.pth", "x"),
        ("ema", "x", "--std", "0.1", "--out", URL),
        ("prepare", "captions", "x.tsv", "--out", URL),
        ("prepare", "captions", "https://host/x.tsv", "--out", "x"),
        ("prepare", "imagenet", "hf://x", "--out", "x"),
        ("precompute", "x.tar", "--encoder", "x", "--out", URL),
        ("precompute", "x.tar", "--encoder", URL, "--out", "x"),
        ("index", "x.tar", "--cache", URL),
    ],
    ids=" ".join,
)
def test_a_url_where_a_path_is_meant_is_refused_at_once(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.tar").touch()
    line = error_of(capsys, *arguments)
    assert line.startswith(f"mdm {arguments[0]}")
    [url] = [argument for argument in arguments if "://" in argument]
    assert f"{url} is a URL; give a path on a local disk" in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_url_is_refused_by_the_name_of_the_option_that_gave_it(capsys):
    assert "error: --prompts s3://bucket/run is a URL" in error_of(capsys, "sample", "x", "--prompts", URL)
    assert "error: --out s3://bucket/run is a URL" in error_of(capsys, "sample", "x", "a cat", "--out", URL)


def test_a_run_in_an_unknown_kind_of_store_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, "train", "emoji", "--data", "x.tar", "--out", "s4://bucket/run", "--dry-run")
    assert line == "mdm train: error: s4://bucket/run cannot be opened: Protocol not known: s4"
    assert not list(tmp_path.iterdir())


def test_no_function_makes_a_folder_of_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="--cache s3://bucket/run is a URL"):
        train(changed(settings(tmp_path, tmp_path / "run"), cache=URL))
    with pytest.raises(ValueError, match="is a URL"):
        build_model(NESTED_MODEL).save_pretrained(URL)
    with pytest.raises(ValueError, match="is a URL"):
        TransformerTextEncoder(32, 1).save(Path(URL))
    with pytest.raises(ValueError, match="is a URL"):
        ShardFolder(Path(URL), {})
    with pytest.raises(ValueError, match="is a URL"):
        from_pretrained(URL)
    assert not list(tmp_path.iterdir())
    check_local("C:/models")
    check_local("runs/a:b/c")
    check_paths(changed(settings(tmp_path, tmp_path), cache="/tmp/cache"))


# Where models are


def test_a_pipeline_is_found_in_the_run_that_left_it(saved):
    assert Pipeline.from_pretrained(saved).config == Pipeline.from_pretrained(saved / "model").config
    assert from_pretrained(saved).config == NESTED_MODEL


def test_a_run_without_a_model_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for load in (Pipeline.from_pretrained, from_pretrained):
        with pytest.raises(FileNotFoundError, match="is a run that has left no model yet"):
            load(tmp_path)


def test_a_pipeline_is_downloaded_with_all_of_its_files(saved, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(saved / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Pipeline.from_pretrained("owner/name").config.size == 16
    assert {"config.json", "model.safetensors", "pipeline.json", "text_encoder/*"} <= set(asked["owner/name"])


def test_a_named_model_without_weights_says_how_to_get_them(capsys):
    assert "mdm_t2i_256: no such directory; no weights of mdm_t2i_256 come with" in error_of(
        capsys, "sample", "mdm_t2i_256", "a cat"
    )


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_no_steps_are_refused_by_the_name_of_the_option(saved, capsys, steps):
    assert f"--steps {steps}" in error_of(capsys, "sample", saved, "a cat", "--steps", steps)


@pytest.mark.parametrize("name", ["pictures.v2", "2026.11.26"])
def test_a_folder_with_a_dot_is_a_folder(saved, tmp_path, name, capsys):
    assert cli.main(["sample", str(saved), "a cat", "--out", f"{tmp_path}/{name}", "--steps", "1"]) == 0
    assert (tmp_path / name / "0000.png").exists()
    (tmp_path / "there.png").mkdir()
    assert cli.main(["sample", str(saved), "a cat", "--out", f"{tmp_path}/there.png", "--steps", "1"]) == 0
    assert (tmp_path / "there.png" / "0000.png").exists()
    assert cli.main(["sample", str(saved), "a cat", "--out", f"{tmp_path}/A.PNG", "--steps", "1"]) == 0
    assert (tmp_path / "A.PNG").is_file()


# Disks


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_by_the_path(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        write_whole(tmp_path / "a.json", lambda _: Path("/dev/full").write_text("x"))
    with pytest.raises(OSError, match=r"File too large: '.*/a\.mp4'$"):
        write_whole(tmp_path / "a.mp4", lambda partial: _raise(OSError(27, "File too large", str(partial))))
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written"):
        write_whole(tmp_path / "a.safetensors", lambda _: save_file({"a": torch.zeros(9)}, "/nowhere/a"))
    with pytest.raises(OSError, match=r"log\.jsonl"), naming(tmp_path / "log.jsonl"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# Logs


def test_a_garbled_line_of_a_log_costs_itself(open_book, tmp_path):  # noqa: F811
    for step in (10, 20, 30):
        book = open_book(step)
        book.record(step, loss=0.5)
        book.close()
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    lines[1:1] = [b'{"step": 15, "kind', b"\xff\xfe", b""]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 31')
    with pytest.warns(UserWarning, match=r"log.jsonl: line 2 and 1 more cannot be read"):
        open_book(30).close()
    assert [record["step"] for record in records_of(tmp_path / "log.jsonl", "step")] == [10, 20, 30]


def test_a_log_that_an_editor_saved_keeps_its_records(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 20}\n', encoding="utf-8-sig", newline="\r\n")
    assert [record["step"] for record in records_of(tmp_path / "log.jsonl", "step")] == [10, 20]


@pytest.mark.parametrize("cut", ['{"note": "é'.encode()[:-1], b"\0" * 600, '{"step": 9}'.encode("utf-16")])
def test_a_log_that_breaks_off_or_has_zeros_after_a_loss_of_power_keeps_its_records(open_book, tmp_path, cut):  # noqa: F811
    records = [json.dumps({"step": step, "kind": "training"}).encode() for step in (10, 20)]
    (tmp_path / "log.jsonl").write_bytes(records[0] + b"\n" + bytes(512) + records[1] + b"\n" + cut)
    book = open_book(20)
    book.record(30, loss=0.5)
    book.close()
    assert [record["step"] for record in records_of(tmp_path / "log.jsonl", "step")] == [10, 20, 30]


def test_a_foreign_line_of_a_log_is_left_as_it_is(open_book, tmp_path):  # noqa: F811
    foreign = [{"note": "a new machine"}, [1], 5, None, {"step": "ten"}]
    text = "".join(json.dumps(line) + "\n" for line in foreign)
    (tmp_path / "log.jsonl").write_text(text)
    (tmp_path / "skipped.jsonl").write_text(text)
    book = open_book(30)
    book.record(40, loss=0.5)
    book.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][:5] == foreign
    assert [record["step"] for record in records_of(tmp_path / "log.jsonl", "step", "kind")] == [40]


# Data that lie elsewhere, and data of which nothing is left


def test_preparing_nothing_is_no_success(tmp_path, capsys):
    (tmp_path / "list.tsv").write_text("url\tcaption\nftp://host/a.jpg\ta cat\n")
    assert "nothing was written" in error_of(
        capsys, "prepare", "captions", tmp_path / "list.tsv", "--out", tmp_path / "out"
    )


def test_indexing_nothing_is_no_success(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert cli.main(["index", str(tmp_path / "a.tar")]) == 2
    assert "no image or clip in any of the 1 shards" in capsys.readouterr().err
