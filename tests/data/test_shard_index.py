import dataclasses
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest

from mdm_models.data.shard_index import from_bytes, hash_of, scan, to_bytes
from mdm_models.data.shards import ShardedSamples
from mdm_models.errors import DataError
from tests.made_data import PICTURE, write_shard


def test_long_names_and_foreign_files_do_not_disturb(tmp_path):
    long = "k" * 150
    path = write_shard(
        tmp_path / "s.tar",
        {
            "._a": {"jpg": b""},
            long: {"txt": b"1", "jpg": b"2"},
            "README": {"md": b""},
            "b": {"JPG": b"3"},
        },
    )
    samples = ShardedSamples([scan(str(path))])
    assert [samples[i]["__key__"] for i in range(len(samples))] == [long, "b"]
    assert samples[0]["jpg"] == b"2"
    assert samples[1]["jpg"] == b"3"


def test_samples_without_a_picture_are_left_out_and_counted(tmp_path):
    samples = {"a": {"txt": b"a"}, "b": {"png": PICTURE}, "c": {"txt": b"", "json": b"{}"}, "d": {"mp4": b""}}
    shard = scan(str(write_shard(tmp_path / "s.tar", samples)))
    assert shard.without_media == 2
    assert shard.keys.tolist() == [hash_of("b"), hash_of("d")]


def test_a_shard_without_any_picture_has_no_samples(tmp_path):
    assert len(scan(str(write_shard(tmp_path / "s.tar", {"a": {"txt": b"a"}})))) == 0


def test_the_hash_of_a_key_is_the_same_on_every_machine():
    """BLAKE2b of "a" with a digest of 8 bytes, by b2sum -l 64."""
    assert hash_of("a") == int.from_bytes(bytes.fromhex("40f89e395b66422f"), "little")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a tar" * 200, "is not a tar file"),
        (gzip.compress(b"x" * 9000, mtime=0), "is compressed.*: unpack it"),
        (lzma.compress(b"x" * 9000), "is compressed.*: unpack it"),
        (b"", "is not a tar file"),
        (bytes(10240), "no samples"),
    ],
    ids=["text", "gzip", "xz", "empty", "zeros"],
)
def test_a_file_without_samples_is_refused_and_named(tmp_path, content, message):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.tar.*{message}"):
        scan(str(path))


def test_a_shard_cut_off_midway_keeps_its_whole_samples(shard_of):
    path = shard_of("a.tar", 4)
    bounds = scan(str(path)).bounds
    path.write_bytes(path.read_bytes()[: bounds[2] + 700])
    shard = scan(str(path))
    assert list(shard.bounds[:2]) == list(bounds[:2])
    assert len(shard) == 2
    assert "cut off" in shard.damage


def test_a_shard_with_a_broken_header_keeps_the_samples_before_it(shard_of):
    path = shard_of("a.tar", 4)
    bounds = scan(str(path)).bounds
    data = bytearray(path.read_bytes())
    data[bounds[2] : bounds[2] + 512] = b"\xff" * 512
    path.write_bytes(data)
    shard = scan(str(path))
    assert len(shard) == 2
    assert f"damaged at byte {bounds[2]}" in shard.damage


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padding", [0, 512, 5000])
def test_a_whole_shard_is_not_called_damaged(shard_of, form, padding):
    path = shard_of("a.tar", 2)
    with tarfile.open(path, "a", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder/b.txt"))
    path.write_bytes(path.read_bytes() + bytes(padding))
    assert scan(str(path)).damage == ""


def test_tars_put_one_behind_the_other_are_said_to_be_so(shard_of):
    first, second = shard_of("a.tar", 2), shard_of("b.tar", 3)
    first.write_bytes(first.read_bytes() + second.read_bytes())
    shard = scan(str(first))
    assert len(shard) == 2
    assert "goes on behind its end" in shard.damage


def test_what_was_found_can_be_kept(pictures_of):
    path = pictures_of("a.tar", 3, b={"txt": b""})
    path.write_bytes(path.read_bytes()[: scan(str(path)).bounds[2] + 700])
    shard = scan(str(path))
    kept = from_bytes(to_bytes(shard), str(path), shard.size)
    for field in dataclasses.fields(shard):
        np.testing.assert_array_equal(getattr(kept, field.name), getattr(shard, field.name))


def test_what_was_kept_of_a_shard_of_another_size_is_not_used(pictures_of):
    shard = scan(str(pictures_of("a.tar", 3)))
    assert from_bytes(to_bytes(shard), shard.path, shard.size + 512) is None
    assert from_bytes(to_bytes(shard)[:-9], shard.path, shard.size) is None
    assert from_bytes(b"something else", shard.path, shard.size) is None


def test_an_index_of_format_1_is_used_where_it_missed_nothing(pictures_of):
    shard = scan(str(pictures_of("a.tar", 3)))

    def older(without_media: int) -> bytes:
        file = io.BytesIO()
        facts = np.array([1, shard.size, without_media])
        np.savez(file, facts=facts, bounds=shard.bounds, keys=shard.keys, damage=np.array(""))
        return file.getvalue()

    assert from_bytes(older(0), shard.path, shard.size).keys.tolist() == shard.keys.tolist()
    assert from_bytes(older(2), shard.path, shard.size) is None
