import json
from pathlib import Path

import pytest

from mdm_models import cli
from mdm_models.data.prepare.imagenet import class_names
from mdm_models.data.reader import caption_of
from mdm_models.text import load_text_encoder
from tests.data.prepare.conftest import encode_image, samples_of

CLASSES = {"n02": "tench", "n01": "goldfish", "n10": "shark"}


def tree(root: Path, classes=CLASSES, count: int = 4, suffix: str = "JPEG") -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}_{i}.{suffix}").write_bytes(encode_image())
    return root


def prepare(root: Path, out: Path, *more: object) -> int:
    return cli.main(["prepare", "imagenet", *map(str, (root, "--out", out, "--threads", 2, *more))])


def test_classes_are_numbered_in_the_order_of_their_folders(tmp_path):
    assert prepare(tree(tmp_path / "train"), tmp_path / "out") == 0
    samples = samples_of(tmp_path / "out")
    assert {key: sample["cls"] for key, sample in samples.items() if key.endswith("_0")} == {
        "n01_0": b"0",
        "n02_0": b"1",
        "n10_0": b"2",
    }
    assert len(samples) == 12
    assert all(sample["jpg"] == encode_image() for sample in samples.values())


def test_the_class_file_encodes_every_caption_as_its_class(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{folder} {name}, synonym\n" for folder, name in CLASSES.items()))
    assert prepare(tree(tmp_path / "train"), tmp_path / "out", "--names", names) == 0
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["goldfish", "tench", "shark"]
    encoder = load_text_encoder(tmp_path / "out" / "classes.txt")
    for sample in samples_of(tmp_path / "out").values():
        features, _ = encoder([caption_of(sample)])
        assert features[0, 0].argmax() == int(sample["cls"])


def test_shards_mix_the_classes_in_the_same_way_each_time(tmp_path):
    root = tree(tmp_path / "train", count=20)
    for name in ("a", "b"):
        assert prepare(root, tmp_path / name, "--images-per-shard", 20) == 0
    for path in tmp_path.glob("a/*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    first = list(samples_of(tmp_path / "a").values())[:20]
    assert {sample["cls"] for sample in first} == {b"0", b"1", b"2"}


def test_a_folder_train_is_found(tmp_path):
    tree(tmp_path / "ILSVRC" / "train")
    (tmp_path / "ILSVRC" / "val").mkdir()
    assert prepare(tmp_path / "ILSVRC", tmp_path / "out") == 0
    assert len(samples_of(tmp_path / "out")) == 12


def test_images_are_shrunk_if_asked(tmp_path):
    assert prepare(tree(tmp_path / "train"), tmp_path / "out", "--size", 8) == 0
    assert all(len(sample["jpg"]) < len(encode_image()) for sample in samples_of(tmp_path / "out").values())


def test_a_corrupt_file_is_skipped_and_named(tmp_path):
    root = tree(tmp_path / "train")
    (root / "n02" / "n02_3.JPEG").write_bytes(b"nothing")
    assert prepare(root, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "reports" / "00000.json").read_text())
    assert report["written"] == 11
    assert report["skipped"]["not an image"][0][0] == "n02_3"


def test_a_folder_with_other_images_needs_another_out(tmp_path, capsys):
    root = tree(tmp_path / "train")
    assert prepare(root, tmp_path / "out") == 0
    (root / "n02" / "n02_3.JPEG").rename(root / "n02" / "n02_4.JPEG")
    assert prepare(root, tmp_path / "out") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_files_of_one_name_get_keys_of_their_own(tmp_path):
    for path in ("cat/1.jpg", "cat/1.png", "dog/1.jpg", "dog/sub/1.jpg", "dog/a.b c.jpg"):
        (tmp_path / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / path).write_bytes(encode_image("PNG" if path.endswith("png") else "JPEG"))
    assert prepare(tmp_path / "pets", tmp_path / "out") == 0
    assert set(samples_of(tmp_path / "out")) == {"cat_1", "cat_1-2", "dog_1", "dog_sub_1", "dog_a_b_c"}


def test_imagenet_has_1000_different_names_without_a_file():
    names = class_names([f"n{number:08d}" for number in range(1000)], None)
    assert names[0] == "tench"
    assert len({name.lower() for name in names}) == 1000


def test_classes_of_one_name_are_told_apart_by_their_folders(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("n1 crane, machine\nn2 crane, bird\nn3 duck\n")
    assert class_names(["n1", "n2", "n3"], names) == ["crane (n1)", "crane (n2)", "duck"]


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        ((), None, "has no folders"),
        (("n01",), None, "have no images"),
        (("n01", "n02"), "n01 cat\n", "no line `n02 NAME`; it lacks 1 of 2 classes"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, folders, names, message):
    root = tmp_path / "train"
    root.mkdir()
    for name in folders:
        (root / name).mkdir()
    more = ()
    if names:
        (tmp_path / "names.txt").write_text(names)
        more = ("--names", tmp_path / "names.txt")
    assert prepare(root, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
