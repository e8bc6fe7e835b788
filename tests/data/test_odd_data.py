"""One odd sample, name or caption costs at most itself: not its shard, not the run."""

import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mdm_models import cli
from mdm_models.data.config import DataConfig
from mdm_models.data.held_out import HeldOut
from mdm_models.data.layout import in_roles, split_name
from mdm_models.data.locations import expand
from mdm_models.data.media import BadSample
from mdm_models.data.prepare.url_list import UrlList
from mdm_models.data.reader import PASSING, SampleReader, Skip, caption_of, prompt_check, prompts_for
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import SampleStream, batches
from mdm_models.errors import DataError
from mdm_models.plain_text import legible, stripped
from mdm_models.processes import Processes
from mdm_models.text import ClassLabels, load_text_encoder
from mdm_models.training.monitor.preview import Preview
from tests.data.prepare.conftest import encode_image, samples_of
from tests.made_data import PICTURE, write_shard

FILES = Path(__file__).parents[1] / "files"
RED = ("http://a.example/1.jpg", "a red apple")


def reader_of(*shards: Path | str, encoder=None, **config) -> SampleReader:
    config = DataConfig(tuple(map(str, shards)), **({"size": 16} | config))
    samples = ShardedSamples(open_shards(config))
    return SampleReader(samples, config, prompts_for(encoder), prompt_check(encoder))


def found(reader: SampleReader) -> list[str]:
    """Of each sample its caption, or why it is left out."""
    tried = [reader.try_read(index) for index in range(len(reader.samples))]
    return [f"{one.key}: {one.reason}" if isinstance(one, Skip) else one[1] for one in tried]


def tar_of(path: Path, *names: str) -> Path:
    """A tar of files of these names: pictures, and captions that say their name."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = PICTURE if name.lower().endswith(("png", "jpg")) else name.encode(errors="surrogateescape")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# Byte order marks


def test_a_caption_has_no_byte_order_mark():
    assert found(reader_of(FILES / "bom.tar")) == ["a red apple", "b: caption empty"]


@pytest.mark.parametrize(
    "files",
    [
        {"txt": "\ufeffa red apple".encode()},
        {"txt": "a red apple".encode("utf-16")},
        {"json": "\ufeff{\"caption\": \"a red apple\"}".encode()},
        {"json": json.dumps({"text": "\ufeffa red apple "}).encode()},
        {"cls": "\ufeffa red apple\r\n".encode()},
    ],
)
def test_no_caption_keeps_a_mark(files):
    assert caption_of(files) == "a red apple"


@pytest.mark.parametrize("name", ["excel.csv", "excel.tsv"])
def test_a_list_of_urls_from_excel_is_read_as_without_its_mark(name):
    assert list(UrlList(FILES / name)) == [RED]


def test_a_list_of_urls_in_utf_16_is_read(tmp_path):
    (tmp_path / "list.tsv").write_text(f"url\tcaption\r\n{RED[0]}\t{RED[1]}\r\n", encoding="utf-16")
    assert list(UrlList(tmp_path / "list.tsv")) == [RED]


def test_lists_of_urls_put_one_behind_the_other_keep_no_mark(tmp_path):
    (tmp_path / "list.tsv").write_bytes((FILES / "excel.tsv").read_bytes() * 2)
    assert list(UrlList(tmp_path / "list.tsv")) == [RED, RED]


def test_the_first_class_of_a_list_has_no_mark():
    assert load_text_encoder(FILES / "classes.txt").number("tench") == 0


def test_names_of_imagenets_folders_have_no_mark(tmp_path):
    (tmp_path / "names.txt").write_text("a tench\n", encoding="utf-8-sig")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(encode_image())
    names = ["--names", f"{tmp_path}/names.txt"]
    assert cli.main(["prepare", "imagenet", f"{tmp_path}/train", "--out", f"{tmp_path}/out", *names]) == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "tench\n"


# Names and captions that are no text


def test_half_a_character_in_a_caption_can_be_encoded():
    [caption] = found(reader_of(FILES / "cut.tar"))
    assert caption.endswith("\ufffd")
    caption.encode()


def test_halves_of_a_character_become_one():
    assert stripped("\ud83d\ude00 ok") == "😀 ok"


def test_a_name_that_is_no_utf_8_costs_nothing():
    reader = reader_of(FILES / "latin1.tar")
    assert len(found(reader)) == 2
    assert reader.samples[0]["__key__"] == "café"
    assert found(reader)[1] == "b"
    assert split_name("caf\udce9.JPG") == ("café", "jpg")
    assert legible("café") == "café"


def test_json_nested_without_end_is_an_unreadable_caption():
    with pytest.raises(BadSample, match="caption unreadable"):
        caption_of({"json": b"[" * 200_000})


def test_a_caption_that_can_be_read_goes_before_one_that_cannot():
    assert caption_of({"txt": b"\xff", "json": b'{"caption": "a cat"}'}) == "a cat"


# Samples


@pytest.mark.parametrize("twin", ["a.png", "a.PNG"])
def test_a_file_twice_costs_its_sample_and_not_the_shard(twin, tmp_path):
    names = [f"{key}.{suffix}" for key in "bcdefgh" for suffix in ("png", "txt")]
    shard = tar_of(tmp_path / "s.tar", "a.png", twin, "a.txt", *names)
    reader = reader_of(shard)
    assert found(reader) == ["a: file twice", *names[1::2]]
    assert reader.try_read(0).reason not in PASSING
    taken = batches(SampleStream(reader, np.arange(8), 0, 0.0), 8, first_chunk=0, rank=0, world_size=1, workers=0)
    assert len(next(taken).captions) == 8


def test_an_empty_shard_among_others_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(DataError, match="no image or clip in"):
        reader_of(tmp_path)
    tar_of(tmp_path / "1.tar", "a.png", "a.txt")
    assert found(reader_of(tmp_path)) == ["a.txt"]
    assert cli.main(["index", str(tmp_path)]) == 0
    assert found(reader_of(tmp_path)) == ["a.txt"]


def test_a_class_that_the_encoder_does_not_know_is_a_skip(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {f"{i}": {"png": PICTURE, "cls": str(i).encode()} for i in range(6)})
    reader = reader_of(shard, encoder=ClassLabels(4))
    assert found(reader) == ["0", "1", "2", "3", "4: caption unknown", "5: caption unknown"]
    assert "a number from 0 to 3" in reader.try_read(4).detail


def test_features_that_lack_a_sample_cost_that_sample(tmp_path):
    class Lacking:
        def check_prompt(self, prompt: str) -> None:
            if prompt == "b.txt":
                raise ValueError("no features")

    assert found(reader_of(tar_of(tmp_path / "s.tar", "a.png", "a.txt", "b.png", "b.txt"), encoder=Lacking())) == [
        "a.txt",
        "b: caption unknown",
    ]


def test_evaluation_and_preview_read_a_sample_once(tmp_path, monkeypatch):
    reader = reader_of(tar_of(tmp_path / "s.tar", "a.png", "a.txt"))
    whole, read = reader.samples[0], []

    def once(self, index):
        read.append(index)
        if len(read) > 1:
            raise OSError("the mount is lost")
        return whole

    monkeypatch.setattr(ShardedSamples, "__getitem__", once)
    here = Processes(0, 1, "cpu")
    [batch] = HeldOut(reader, np.arange(1), 1, 1, here, keep=False).batches(0)
    assert batch.captions == ["a.txt"]
    read.clear()
    from mdm_models.training.config import OutputConfig

    assert Preview.of(OutputConfig(sample_every=1), reader, [0], here).captions == ["a.txt"]
    assert isinstance(reader.try_read(0), Skip)


# Layouts


@pytest.mark.parametrize(
    ("names", "caption"),
    [
        (("a.img.png", "a.caption.txt"), "a.caption.txt"),
        (("a.png", "a.text"), "a.text"),
        (("a.png", "a.caption"), "a.caption"),
        (("a.mask.png", "a.image.png", "a.txt"), "a.txt"),
        (("a.png", "a.mask.png", "a.long.txt", "a.txt"), "a.txt"),
        (("v1.0/a.IMG.PNG", "v1.0/a.Prompt.TXT"), "v1.0/a.Prompt.TXT"),
    ],
)
def test_pictures_and_captions_may_have_names_of_their_own(names, caption, tmp_path):
    assert found(reader_of(tar_of(tmp_path / "s.tar", *names))) == [caption]


def test_a_plain_suffix_goes_before_a_named_one_and_doubt_takes_none():
    assert in_roles({"jpg": 1, "img.png": 2})["jpg"] == 1
    assert "png" not in in_roles({"jpg": 1, "img.png": 2})
    assert "png" not in in_roles({"depth.png": 1, "mask.png": 2})
    assert in_roles({"depth.png": 1, "img.png": 2})["png"] == 2


def test_files_apart_from_their_sample_are_said_to_be_so(tmp_path):
    shard = tar_of(tmp_path / "s.tar", "a.png", "b.png", "c.png", "a.txt", "b.txt", "c.txt")
    skip = reader_of(shard).try_read(1)
    assert (skip.key, skip.reason) == ("b", "caption missing")
    assert "must be neighbours" in skip.detail
    assert "tar --sort=name" in skip.detail
    whole = tar_of(tmp_path / "t.tar", "a.png", "a.txt", "b.png")
    assert "neighbours" not in reader_of(whole).try_read(1).detail


# Paths


@pytest.mark.parametrize("folder", ["set [v2]", "set {v2}", "set {a,b}", "what?*"])
def test_a_shard_that_is_there_is_taken_whatever_characters_it_has(folder, tmp_path):
    (tmp_path / folder).mkdir()
    shard = tar_of(tmp_path / folder / "0 [1].tar", "a.png", "a.txt")
    plain = tar_of(tmp_path / folder / "1.tar", "a.png", "a.txt")
    assert expand([str(shard)]) == [str(shard)]
    assert expand([f"{tmp_path}/{folder}"]) == [str(shard), str(plain)]
    assert expand([f"{tmp_path}/{folder}/[1].tar"]) == [str(plain)]
    assert expand([f"{tmp_path}/{folder}/{{1..1}}.tar"]) == [str(plain)]


def test_a_shard_in_a_store_is_taken_whatever_characters_it_has(bucket):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/set [v2]/0.tar", b"x")
    assert expand(["memory://bucket/set [v2]/0.tar"]) == ["memory://bucket/set [v2]/0.tar"]


# Folders of pictures


@pytest.mark.parametrize("source", ["imagenet", "folder"])
def test_folders_are_read_as_real_ones_are(source, tmp_path, capsys):
    root, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    for folder in (root / "a" / "x.jpg", root / "a" / ".ipynb_checkpoints", elsewhere):
        folder.mkdir(parents=True)
    for file in ("a/1.jpg", "a/.ipynb_checkpoints/1-checkpoint.jpg"):
        (root / file).write_bytes(encode_image())
    (elsewhere / "x.jpg").write_bytes(encode_image())
    (root / "a" / "sub").symlink_to(elsewhere)
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "a" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encode_image())
    assert cli.main(["prepare", source, str(root), "--out", f"{tmp_path}/out", "--threads", "2"]) == 0
    assert set(samples_of(tmp_path / "out")) == {"a_1", "a_sub_x", "a_café"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"unreadable": 1}


def test_a_folder_whose_name_is_no_utf_8_is_a_class(tmp_path):
    root = tmp_path / os.fsdecode(b"train") / os.fsdecode(b"caf\xe9")
    root.mkdir(parents=True)
    (root / "1.jpg").write_bytes(encode_image())
    assert cli.main(["prepare", "imagenet", str(root.parent), "--out", f"{tmp_path}/out"]) == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "café\n"
    [sample] = samples_of(tmp_path / "out").values()
    assert sample["txt"].decode() == "café"
