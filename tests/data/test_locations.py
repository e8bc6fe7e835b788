import fsspec
import pytest

from mdm_models.data import locations
from mdm_models.data.locations import UnreachableError, download, expand, look_up, patiently, write_beside
from mdm_models.errors import DataError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0, 0))


@pytest.mark.parametrize("pattern", ["{dir}", "{dir}/{{a,b}}.tar", "{dir}/*.tar", "file://{dir}/*.tar"])
def test_a_folder_braces_and_wildcards_name_the_same_shards(pictures_of, tmp_path, pattern):
    shards = [str(pictures_of(name, 1)) for name in ("a.tar", "b.tar")]
    assert expand([pattern.format(dir=tmp_path)]) == expand(shards) == shards


def test_a_folder_of_img2dataset_is_its_shards(pictures_of, tmp_path):
    shards = [str(pictures_of(f"0000{i}.tar", 1)) for i in range(2)]
    for name in ("00000_stats.json", "00000.parquet", "00001.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert expand([str(tmp_path)]) == shards


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(locations.os, "listdir", refused)
    with pytest.raises(DataError, match=f"the folder {tmp_path} cannot be read: Permission denied"):
        expand([str(tmp_path)])


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


@pytest.mark.parametrize("pattern", ["memory://bucket/", "memory://bucket/*.tar", "memory://bucket/{a,b}.tar"])
def test_folders_wildcards_and_braces_of_an_object_store(pictures_of, bucket, pattern):
    for name in ("a.tar", "b.tar"):
        bucket(pictures_of(name, 1))
    fsspec.filesystem("memory").pipe_file("/bucket/00000_stats.json", b"{}")
    assert [name.rpartition("/")[2] for name in expand([pattern])] == ["a.tar", "b.tar"]


def test_a_query_is_no_wildcard():
    assert expand(["https://host/a.tar?sign=1"]) == ["https://host/a.tar?sign=1"]


def test_commands_expand_their_braces():
    assert expand(["pipe:cat {a,b}.tar"]) == ["pipe:cat a.tar", "pipe:cat b.tar"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://bucket/nowhere.tar", "no shard memory"),
        ("memory://bucket", "end it in /"),
        ("nosuch://bucket/a.tar", "nosuch"),
    ],
)
def test_an_address_without_a_shard_is_refused(pictures_of, bucket, name, message):
    bucket(pictures_of("a.tar", 1))
    with pytest.raises(DataError, match=message):
        look_up(name)


def test_another_version_of_a_shard_is_told_from_the_first(pictures_of, bucket):
    shard = pictures_of("a.tar", 1)
    first = look_up(bucket(shard))
    assert look_up("memory://bucket/a.tar") == first
    assert look_up(bucket(shard))[1] != first[1]


def test_a_failing_command_says_what_it_said(tmp_path):
    with pytest.raises(OSError, match="status 3: no luck"):
        download("pipe:echo no luck >&2; exit 3", tmp_path / "a.tar")


def test_what_fails_is_tried_again():
    attempts = iter([OSError("busy"), TimeoutError(), "at last"])

    def attempt() -> str:
        found = next(attempts)
        if isinstance(found, Exception):
            raise found
        return found

    assert patiently(attempt) == "at last"


def test_what_always_fails_is_given_up():
    tried = []

    def attempt() -> None:
        tried.append(1)
        raise OSError("no\nnetwork")

    with pytest.raises(UnreachableError, match="no network"):
        patiently(attempt)
    assert len(tried) == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/a\.tar\.index cannot be written"):
        write_beside(f"{tmp_path}/nowhere/a.tar", ".index", b"")
