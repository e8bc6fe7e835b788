import gzip
from pathlib import Path

import pytest
import webdataset

from mdm_models.training.errors import DataError
from mdm_models.training.shards import ShardedSamples, expand, scan, scan_all
from tests.training.conftest import write_shard

SAMPLE = Path(__file__).parents[2] / "recipes" / "data"


def test_random_access_finds_what_webdataset_streams():
    paths = expand([f"{SAMPLE}/clips-{{000..001}}.tar"])
    samples = ShardedSamples(scan_all(paths))
    streamed = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(samples) == len(streamed) == 32
    for index in (31, 0, 16, 15):
        for suffix in ("__key__", "txt", "mp4"):
            assert samples[index][suffix] == streamed[index][suffix]


def test_a_sample_knows_its_shard(shard_of):
    samples = ShardedSamples(scan_all([str(shard_of("a.tar", 2)), str(shard_of("b.tar", 3))]))
    assert [Path(samples.shard_of(i).path).name for i in range(5)] == ["a.tar"] * 2 + ["b.tar"] * 3


def test_long_names_and_foreign_files_do_not_disturb(tmp_path):
    long = "k" * 150
    path = write_shard(
        tmp_path / "s.tar", {"._a": {"txt": b""}, long: {"txt": b"1"}, "README": {"md": b""}, "b": {"txt": b"2"}}
    )
    samples = ShardedSamples([scan(str(path))])
    assert samples[0]["__key__"] == long
    assert samples[2]["txt"] == b"2"


@pytest.mark.parametrize("pattern", ["{dir}", "{dir}/{{a,b}}.tar", "{dir}/*.tar"])
def test_a_folder_braces_and_wildcards_name_the_same_shards(shard_of, tmp_path, pattern):
    shards = [str(shard_of(name, 1)) for name in ("a.tar", "b.tar")]
    assert expand([pattern.format(dir=tmp_path)]) == expand(shards) == shards


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.tar", "no shard .*nowhere.tar"),
        ("a-{0..1}.tar", "no shard .*a-0.tar"),
        ("*.tar", "no file matches"),
        ("a{", "no shard|not balanced"),
        ("", r"no \*.tar"),
    ],
)
def test_a_name_without_shards_is_refused(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        expand([f"{tmp_path}/{name}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a tar" * 200, "not an"),
        (gzip.compress(b"x" * 9000, mtime=0), "not an"),
        (b"", "not an"),
        (bytes(10240), "no samples"),
    ],
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
    assert len(shard.bounds) - 1 == 2
    assert "cut off" in shard.damage


def test_a_shard_with_a_broken_header_keeps_the_samples_before_it(shard_of):
    path = shard_of("a.tar", 4)
    bounds = scan(str(path)).bounds
    data = bytearray(path.read_bytes())
    data[bounds[2] : bounds[2] + 512] = b"\xff" * 512
    path.write_bytes(data)
    shard = scan(str(path))
    assert len(shard.bounds) - 1 == 2
    assert f"damaged at byte {bounds[2]}" in shard.damage


def test_a_whole_shard_is_not_called_damaged(shard_of):
    assert scan(str(shard_of("a.tar", 2))).damage == ""
