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


@pytest.mark.parametrize(
    "table",
    [
        "file_name;text\r\na.jpg;a cat, asleep\r\n",  # Excel where the comma is in numbers
        "sep=;\nfile_name;text\na.jpg;a cat, asleep\n",
        "file_name\ttext\na.jpg\ta cat, asleep\n",
        'FILE_NAME,Text\na.jpg,"a cat, asleep"\n',
        'filename,caption\n./a.jpg,"a cat, asleep"\n',
        'file_name,text,text\na.jpg,"a cat, asleep",other\n',
        'file_name,text\na.jpg,"a cat, asleep",,\n',
    ],
)
def test_metadata_may_be_written_as_spreadsheets_do(root, table):
    (root / "metadata.csv").write_bytes(table.encode())
    assert prepare(root) == 0
    assert captions(root)["a"] == "a cat, asleep"


def test_metadata_in_the_encoding_of_excel_are_read(root):
    """Of a table to which rows in UTF-8 were added, too."""
    rows = "file_name,text\na.jpg,café “noir”\n".encode("cp1252"), "sub/b c.jpg,crème\n".encode()
    (root / "metadata.csv").write_bytes(b"".join(rows))
    assert prepare(root) == 0
    assert captions(root) == {"a": "café “noir”", "sub_b_c": "crème"}


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    for picture in ("a", "sub/b c"):
        (root / picture).with_suffix(".txt").write_text("a cat")
    scandir = os.scandir

    def refused(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.warns(UserWarning, match=r"own/sub is left out: Permission denied"):
            assert prepare(root) == 0
    assert list(captions(root)) == ["a"]


def test_a_caption_in_json_that_is_no_text_is_named(root):
    (root / "a.json").write_text('{"text": 3}')
    (root / "sub" / "b c.txt").write_text("a dog")
    assert prepare(root) == 0
    assert captions(root) == {"sub_b_c": "a dog"}
    reports = [path.read_text() for path in (root.parent / "out" / "reports").iterdir()]
    assert any("a.json: its text is 3, which is no text" in report for report in reports)


def test_a_class_whose_folder_has_a_line_break_in_its_name_is_one_line(tmp_path):
    root = pictures(tmp_path / "own", "red\napple/1.jpg", "pear/2.jpg")
    assert prepare(root) == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "pear\nred apple\n"


@pytest.mark.parametrize("written", ["sub\\\\b c.jpg", "./sub/b c.jpg", "sub//b c.jpg"])
def test_metadata_may_name_a_file_as_windows_does(root, written):
    (root / "metadata.jsonl").write_text(f'{{"file_name": "{written}", "text": "a dog"}}\n')
    assert prepare(root) == 0
    assert captions(root)["sub_b_c"] == "a dog"


def test_one_accent_written_in_two_ways_is_one_name(tmp_path):
    root = pictures(tmp_path / "own", "cafe\u0301.jpg")  # as a Mac's archives have it
    (root / "metadata.csv").write_text("file_name,text\ncaf\u00e9.jpg,a cup\n")
    assert prepare(root) == 0
    assert list(captions(root).values()) == ["a cup"]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a c'),
        ("metadata.jsonl", '{"text": "a cat"}'),
        ("metadata.jsonl", "[1]"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}'),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": NaN}'),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": {"en": "a cat"}}'),
        ("metadata.jsonl", '{"file_name": 1, "text": "a cat"}'),
        ("metadata.csv", "a.jpg,a cat, asleep"),
        ("metadata.csv", ",a cat"),
    ],
)
def test_a_record_that_cannot_be_read_costs_its_picture_and_is_named(root, name, bad):
    good = '{"file_name": "sub/b c.jpg", "text": "a dog"}' if name.endswith("l") else "sub/b c.jpg,a dog"
    (root / name).write_text("\n".join([*["file_name,text"] * name.endswith("v"), bad, good, ""]))
    with pytest.warns(UserWarning, match=f"{name}: record 1 "):
        assert prepare(root) == 0
    assert captions(root) == {"sub_b_c": "a dog"}
    report = json.loads((root.parent / "out" / "report.json").read_text())
    assert report["skipped"] == {"caption missing": 1}


def test_captions_that_belong_to_no_picture_are_named(tmp_path):
    root = pictures(tmp_path / "own", "images/1.jpg")
    (root / "captions").mkdir()
    (root / "captions" / "1.txt").write_text("a cat")
    (root / "metadata.csv").write_text("file_name,text\ngone.jpg,a dog\n")
    with pytest.warns(UserWarning, match="1 ") as said:
        assert prepare(root) == 0
    assert [str(warning.message) for warning in said] == [
        f"{root}: 1 pictures that metadata name are not there, {root}/gone.jpg among them",
        f"{root}: 1 texts belong to no picture, {root}/captions/1.txt among them",
    ]


def test_what_is_no_file_is_named_and_not_waited_for(root):
    for name in ("pipe.jpg", "endless.jpg"):
        (root / name).with_suffix(".txt").write_text("a dog")
    os.mkfifo(root / "pipe.jpg")
    (root / "endless.jpg").symlink_to("/dev/zero")
    (root / "a.txt").write_text("a cat")
    assert prepare(root) == 0
    assert captions(root).keys() == {"a", "sub_b_c"}
    report = json.loads((root.parent / "out" / "report.json").read_text())
    assert report["skipped"] == {"unreadable": 2}


def test_of_two_records_about_one_picture_the_last_counts_and_is_named(root):
    (root / "metadata.csv").write_text('file_name,text\na.jpg,a cat\nsub/b c.jpg,"a\ndog"\na.jpg,a lion\n')
    with pytest.warns(UserWarning, match=r"record 3 is about a\.jpg as an earlier one is, and replaces it"):
        assert prepare(root) == 0
    assert captions(root)["a"] == "a lion"


@pytest.mark.parametrize("beside", ["a.TXT", "a.jpg.txt", "a.Caption"])
def test_a_caption_may_be_named_in_capitals_or_after_the_whole_name(root, beside):
    (root / beside).write_text("a cat")
    assert prepare(root) == 0
    assert captions(root)["a"] == "a cat"


@pytest.mark.parametrize("text", [b"\0" * 64, "\ufeff\r\n".encode("utf-16"), b" \r\n\0"])
def test_a_caption_of_zero_bytes_or_white_space_is_none(root, text):
    (root / "a.txt").write_bytes(text)
    (root / "sub" / "b c.txt").write_text("a dog\0")
    assert prepare(root) == 0
    assert captions(root) == {"sub_b_c": "a dog"}


def test_pictures_as_browsers_and_phones_save_them_are_taken_or_named(tmp_path):
    root = pictures(tmp_path / "own", "cat/a.jfif", "cat/b.JPE")
    (root / "cat" / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))
    assert prepare(root) == 0
    assert set(captions(root)) == {"cat_a", "cat_b"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == {"not an image": 1}


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
        (lambda root: (pictures(root, "a.jpg") / "metadata.jsonl").write_text("{\n"), "jsonl: record 1 cannot be read"),
        (
            lambda root: (pictures(root, "a.jpg") / "metadata.csv").write_text('file_name,text\na.jpg,"cat\nb.jpg,b'),
            "the quote that opens in row 2 is never closed",
        ),
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
