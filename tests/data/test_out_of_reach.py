"""A store that cannot be asked is found out soon, and does not keep from what has been copied."""

import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mdm_models.data import locations
from mdm_models.data.config import DataConfig
from mdm_models.data.locations import UnreachableError, patiently, store_of
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.errors import DataError


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(locations, "_given_up", {})


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """For how long, in seconds, without sleeping."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


class StoreError(Exception):
    def __init__(self, status: int = 0, response: object = None):
        super().__init__(f"status {status}")
        self.status, self.response = status, response


def failing(error: Exception):
    def attempt():
        raise error

    return attempt


def test_one_store_is_waited_for_once(slept):
    for _ in range(24):
        with pytest.raises(UnreachableError):
            patiently(failing(ConnectionRefusedError()), "http://host")
    assert slept == [1, 4, 16]
    with pytest.raises(UnreachableError):
        patiently(failing(ConnectionRefusedError()), "http://another")
    assert len(slept) == 6


def test_a_store_that_answers_again_is_waited_for_again(slept):
    with pytest.raises(UnreachableError):
        patiently(failing(ConnectionRefusedError()), "http://host")
    assert patiently(lambda: "here", "http://host") == "here"
    with pytest.raises(UnreachableError):
        patiently(failing(ConnectionRefusedError()), "http://host")
    assert len(slept) == 6


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("The specified bucket does not exist"),
        StoreError(404),
        StoreError(response={"Error": {"Code": "NoSuchBucket"}, "ResponseMetadata": {"HTTPStatusCode": 404}}),
    ],
)
def test_a_missing_bucket_is_not_waited_for(slept, error):
    cause = StoreError(response={"ResponseMetadata": {"HTTPStatusCode": 404}})
    error.__cause__ = cause  # as s3fs has it
    with pytest.raises(FileNotFoundError):
        patiently(failing(error), "s3://bucket")
    assert slept == []


@pytest.mark.parametrize("error", [StoreError(403), StoreError(401), PermissionError("forbidden")])
def test_what_is_forbidden_is_not_waited_for_and_says_nothing_of_others(slept, error):
    with pytest.raises(UnreachableError):
        patiently(failing(error), "s3://bucket")
    assert slept == []
    with pytest.raises(UnreachableError):
        patiently(failing(StoreError(503)), "s3://bucket")
    assert slept == [1, 4, 16]


def test_a_full_disk_here_is_no_store_out_of_reach(slept):
    with pytest.raises(OSError, match="No space"):
        patiently(failing(OSError(28, "No space left on device")), "s3://bucket")
    assert slept == []


def test_a_store_is_its_protocol_and_host():
    assert store_of("s3://bucket/a/0.tar") == store_of("s3://bucket/1.tar?x=2") == "s3://bucket"
    assert store_of("pipe:cat a.tar") == ""


def test_two_dozen_dead_urls_are_reported_soon(tmp_path):
    config = DataConfig(("http://127.0.0.1:9/{00..23}.tar",), cache=str(tmp_path / "cache"))
    begun = time.monotonic()
    with pytest.raises(DataError, match="24 of 24 shards"):
        open_shards(config)
    assert time.monotonic() - begun < 20  # 108 before, on a quiet machine


def test_copies_are_used_where_their_store_cannot_be_asked(pictures_of, bucket, tmp_path, monkeypatch, slept):
    urls = tuple(bucket(pictures_of(f"{i}.tar", 2)) for i in range(3))
    config = DataConfig(urls, size=16, cache=str(tmp_path / "cache"))
    found = open_shards(config)

    def dead(self, path):
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(MemoryFileSystem, "info", dead)
    with pytest.warns(UserWarning, match="memory://bucket cannot be asked; copies of its shards are used"):
        again = open_shards(config)
    assert [shard.version for shard in again] == [shard.version for shard in found]
    assert ShardedSamples(again)[5]["txt"] == b"21"
    assert slept == []
