"""Folders of one's own pictures, captioned in all the usual ways."""

import csv
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mdm_models import cli
from mdm_models.data.prepare.captioned_folder import shards_for
from mdm_models.data.reader import caption_of
from tests.data.prepare.conftest import encode_image, samples_of
from tests.made_data import encode_clip


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_image())
    return root


def prepare(root: Path, *more: object) -> int:
    return cli.main(["prepare", "folder", *map(str, (root, "--out", root.parent / "out", "--threads", 2, *more))])


def captions(root: Path) -> dict[str, str]:
    """Key → caption of what `prepare` made of a folder."""
    return {key: caption_of(sample) for key, sample in samples_of(root.parent / "out").items()}


@pytest.fixture
def root(tmp_path) -> Path:
    return pictures(tmp_path / "own", "a.jpg", "sub/b c.jpg")


@pytest.mark.parametrize(
    ("suffix", "text"), [("txt", "a cat\n"), ("caption", "\ufeffa cat"), ("json", '{"text": "a cat"}')]
)
def test_a_file_beside_a_picture_is_its_caption(root, suffix, text):
    (root / f"a.{suffix}").write_text(text, encoding="utf-8")
    (root / "sub" / f"b c.{suffix}").write_text(text, encoding="utf-8")
    assert prepare(root) == 0
    assert captions(root) == {"a": "a cat", "sub_b_c": "a cat"}


@pytest.mark.parametrize("column", ["text", "caption", "Text"])
def test_metadata_of_an_imagefolder_are_captions(root, column):
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        csv.writer(file).writerows([["file_name", column], ["a.jpg", "a cat, asleep"]])
    (root / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "b c.jpg", column: "a dog"}) + "\n")
    assert prepare(root) == 0
    assert captions(root) == {"a": "a cat, asleep", "sub_b_c": "a dog"}


def test_folders_are_captions_and_classes(tmp_path):
    root = pictures(tmp_path / "own", "red_apple/1.jpg", "red_apple/2.jpg", "dog/1.jpg")
    assert prepare(root) == 0
    assert captions(root) == {"red_apple_1": "red apple", "red_apple_2": "red apple", "dog_1": "dog"}
    assert (tmp_path / "out" / "classes.txt").read_text().split("\n")[:2] == ["dog", "red apple"]
    assert samples_of(tmp_path / "out")["red_apple_2"]["cls"] == b"1"


def test_a_caption_beside_a_picture_goes_before_the_name_of_its_folder(tmp_path):
    root = pictures(tmp_path / "own", "apple/1.jpg", "apple/2.jpg")
    (root / "apple" / "1.txt").write_text("a green apple")
    assert prepare(root) == 0
    assert captions(root) == {"apple_1": "a green apple", "apple_2": "apple"}
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_the_folder_train_alone_is_taken(tmp_path):
    root = pictures(tmp_path / "own", "train/cat/1.jpg", "test/cat/2.jpg")
    assert prepare(root) == 0
    assert captions(root) == {"cat_1": "cat"}


def test_pictures_without_a_caption_are_named_or_given_one(root):
    (root / "sub" / "b c.txt").write_text("a dog")
    assert prepare(root) == 0
    [report] = (root.parent / "out" / "reports").glob("*.json")
    assert json.loads(report.read_text())["skipped"]["caption missing"][0][0] == "a"
    assert prepare(root, "--caption", "a pet", "--out", root.parent / "other") == 0
    assert {caption_of(sample) for sample in samples_of(root.parent / "other").values()} == {"a dog", "a pet"}


def test_clips_are_taken_and_what_is_damaged_is_skipped_by_name(tmp_path):
    root = pictures(tmp_path / "own", "cat/a.jpg")
    (root / "cat" / "moves.mp4").write_bytes(encode_clip())
    (root / "cat" / "broken.png").write_bytes(b"no picture")
    assert prepare(root) == 0
    assert {key: set(sample) & {"jpg", "mp4"} for key, sample in samples_of(tmp_path / "out").items()} == {
        "cat_a": {"jpg"},
        "cat_moves": {"mp4"},
    }
    [report] = (tmp_path / "out" / "reports").glob("*.json")
    assert json.loads(report.read_text())["skipped"]["not an image"][0][0] == "cat_broken"


def test_two_files_of_one_stem_are_two_samples(tmp_path):
    root = pictures(tmp_path / "own", "cat/a.jpg", "cat/a.png")
    assert prepare(root) == 0
    assert set(captions(root)) == {"cat_a", "cat_a-2"}


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_data_set_of_hugging_face_is_read_row_by_row(tmp_path, form):
    picture = {"bytes": encode_image(), "path": "x.jpg"}
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    table = pyarrow.table({"image": [picture] * 3, "label": [1, 0, -1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    root = tmp_path / "own"
    (root / "data").mkdir(parents=True)
    path = root / "data" / f"train-00000-of-00001.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert prepare(root) == 0
    samples = samples_of(tmp_path / "out")
    assert [(caption_of(sample), sample["cls"]) for sample in samples.values()] == [("dog", b"1"), ("cat", b"0")]
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: pictures(root, "a.jpg"), "nothing says what the 1 pictures of"),
        (lambda root: root.mkdir(), "has no pictures or clips"),
        (lambda root: None, "is not a folder"),
        (lambda root: (pictures(root, "a.jpg") / "metadata.csv").write_text("name\na.jpg\n"), "has no file_name"),
        (lambda root: (pictures(root, "a.jpg") / "metadata.jsonl").write_text("{\n"), "metadata.jsonl cannot be read"),
        (lambda root: (pictures(root, "c/a.jpg") / "x.parquet").write_bytes(b"PAR1"), "is not a whole .parquet file"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path, capsys, make, message):
    make(tmp_path / "own")
    assert prepare(tmp_path / "own") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_same_command_again_leaves_finished_shards_alone_and_makes_the_rest(tmp_path):
    root = pictures(tmp_path / "own", *(f"cat/{i}.jpg" for i in range(4)))
    assert prepare(root, "--per-shard", 2) == 0
    first, second = sorted((tmp_path / "out").glob("*.tar"))
    whole, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    assert prepare(root, "--per-shard", 2) == 0
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == before


def test_a_folder_of_pictures_stands_for_shards_that_are_made_once_and_anew_when_it_changes(tmp_path, capsys):
    root = pictures(tmp_path / "own", "cat/1.jpg", "cat/2.jpg")
    cache = str(tmp_path / "cache")
    [folder] = shards_for([str(root)], 64, cache)
    assert {caption_of(sample) for sample in samples_of(folder).values()} == {"cat"}
    assert "made once" in capsys.readouterr().out
    assert shards_for([str(root)], 16, cache) == (folder,)
    assert capsys.readouterr().out == ""
    os.utime(root / "cat" / "1.jpg", ns=(0, 0))
    assert shards_for([str(root)], 64, cache) != (folder,)


def test_names_of_shards_stay_as_they_are(tmp_path):
    (tmp_path / "a.tar").touch()
    names = (str(tmp_path), "s3://bucket/{0..9}.tar", str(tmp_path / "nowhere"))
    assert shards_for(names, 64, str(tmp_path / "cache")) == names
