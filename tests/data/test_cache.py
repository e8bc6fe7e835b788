import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mdm_models.data import locations
from mdm_models.data.cache import ABANDONED, ShardCache
from mdm_models.data.locations import UnreachableError
from mdm_models.errors import DataError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0, 0))


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    """Room for 2500 bytes."""
    cache = ShardCache(tmp_path / "cache", 2500)
    cache.prepare()
    return cache


@pytest.fixture
def command(tmp_path):
    """command("a") writes 1000 bytes "a", and notes in tmp_path/calls that it ran."""

    def make(letter: str, then: str = "") -> str:
        (tmp_path / letter).write_text(letter * 1000)
        return f"pipe:echo {letter} >> {tmp_path}/calls; cat {tmp_path}/{letter}; {then}"

    return make


def calls(tmp_path: Path) -> str:
    return "".join((tmp_path / "calls").read_text().split())


def copies(cache: ShardCache) -> int:
    return len(list(cache.folder.glob("*.tar")))


def read(cache: ShardCache, name: str) -> bytes:
    with cache.open(name, None, "") as file:
        return file.read()


def test_a_shard_is_copied_once(cache, command, tmp_path):
    assert read(cache, command("a")) == read(cache, command("a")) == b"a" * 1000
    assert calls(tmp_path) == "a"


def test_each_version_has_a_copy_of_its_own(cache, command, tmp_path):
    for version in ("1", "2", "1"):
        cache.open(command("a"), None, version).close()
    assert calls(tmp_path) == "aa"


def test_the_copy_opened_longest_ago_makes_room(cache, command, tmp_path):
    for number, letter in enumerate("ab"):
        cache.open(command(letter), 1000, "").close()
        os.utime(cache._path(command(letter), ""), (number, number))
    read(cache, command("a"))
    cache.open(command("c"), 1000, "").close()
    assert copies(cache) == 2
    read(cache, command("a"))
    assert calls(tmp_path) == "abc"
    read(cache, command("b"))
    assert calls(tmp_path) == "abcb"


def test_a_copy_in_use_is_never_removed(cache, command):
    with cache.open(command("a"), 1000, "") as first, cache.open(command("b"), 1000, "") as second:
        cache.open(command("c"), 1000, "").close()
        assert copies(cache) == 3
        assert first.read(1) + second.read(1) == b"ab"
    cache.open(command("d"), 1000, "").close()
    assert copies(cache) == 2


def _open_and_wait(cache: ShardCache, name: str, opened, done) -> None:
    with cache.open(name, 1000, ""):
        opened.set()
        done.wait(30)


def test_a_copy_in_use_by_another_process_is_never_removed(cache, command, tmp_path):
    processes = multiprocessing.get_context("fork")
    opened, done = processes.Event(), processes.Event()
    other = processes.Process(target=_open_and_wait, args=(cache, command("a"), opened, done))
    other.start()
    assert opened.wait(30)
    for letter in "bcd":
        cache.open(command(letter), 1000, "").close()
    done.set()
    other.join()
    assert read(cache, command("a")) == b"a" * 1000
    assert calls(tmp_path) == "abcd"


def test_processes_that_want_the_same_shard_copy_it_once(cache, command, tmp_path):
    name = command("a", "sleep 0.3")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(read, [(cache, name)] * 4) == [b"a" * 1000] * 4
    assert calls(tmp_path) == "a"


def test_half_a_copy_is_never_taken_for_a_whole_one(cache, command, tmp_path):
    with pytest.raises(UnreachableError, match="status 7"):
        cache.open(command("a", "exit 7"), None, "")
    with pytest.raises(UnreachableError, match="1000 of 2000 bytes"):
        cache.open(command("b"), 2000, "")
    assert calls(tmp_path) == "aaabbb"
    assert not list(cache.folder.glob("*.tar*[!k]"))


def test_what_a_killed_process_left_is_removed_after_a_while(cache, command):
    old, new = cache.folder / "old.tar.partial", cache.folder / "new.tar.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - ABANDONED - 1,) * 2)
    read(cache, command("a"))
    assert not old.exists()
    assert new.exists()


def test_what_is_remembered_outlives_the_copy(cache, command):
    cache.remember("s3://b/a.tar", "1", b"facts")
    for letter in "abcd":
        cache.open(command(letter), 1000, "").close()
    assert cache.recall("s3://b/a.tar", "1") == b"facts"
    assert cache.recall("s3://b/a.tar", "2") is None


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cache: the folder .*file/cache"):
        ShardCache(tmp_path / "file" / "cache", 1e9).prepare()


def test_the_cache_is_in_the_users_cache_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache.of("", 2.0) == ShardCache(tmp_path / "mdm_models" / "shards", 2e9)
