"""Folders of object stores."""

import fsspec
import pytest

from mdm_models.data import locations
from mdm_models.training.checkpoint.store import Store, StoreError


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "WAITS", ())
    monkeypatch.setattr(locations, "_given_up", {})
    yield Store(f"memory://bucket/{tmp_path.name}/" if request.param == "memory" else f"file://{tmp_path}/store/")
    fsspec.filesystem("memory").store.clear()


def test_what_is_put_is_listed_and_got(store, tmp_path):
    (tmp_path / "a").write_bytes(b"contents")
    store.put(tmp_path / "a", "folder/inner/a.bin")
    store.write("b.txt", b"text")
    assert store.names() == ["b.txt", "folder/inner/a.bin"]
    assert store.names("folder") == ["folder/inner/a.bin"]
    store.get("folder/inner/a.bin", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"contents"
    assert store.read("b.txt") == b"text"


def test_what_is_not_there_is_nothing(store):
    assert store.names() == store.names("folder") == []
    assert store.read("b.txt") is None
    store.delete(["b.txt"])


def test_deleted_files_are_not_there(store):
    for name in "abc":
        store.write(f"folder/{name}", b"")
    store.delete(["folder/a", "folder/x", "folder/c"])
    assert store.names() == ["folder/b"]


def test_a_failure_names_the_url_and_the_reason(store, tmp_path):
    with pytest.raises(StoreError, match=rf"^{store.url} cannot be read: .*nowhere"):
        store.get("nowhere", tmp_path / "a")
    with pytest.raises(StoreError, match=rf"^{store.url} cannot be written to: .*missing"):
        store.put(tmp_path / "missing", "a")


def test_what_fails_is_tried_again(store, monkeypatch):
    monkeypatch.setattr(locations, "WAITS", (0, 0))
    kind = type(fsspec.url_to_fs(store.url)[0])
    ours = kind.pipe_file
    failures = iter([ConnectionResetError("reset"), TimeoutError("slow")])

    def pipe_file(self, path, data, **options):
        if error := next(failures, None):
            raise error
        return ours(self, path, data, **options)

    monkeypatch.setattr(kind, "pipe_file", pipe_file)
    store.write("a", b"there")
    assert store.read("a") == b"there"


@pytest.mark.parametrize("url", ["nothing://bucket/run", "s4://bucket"])
def test_an_unknown_protocol_is_named(url):
    with pytest.raises(StoreError, match=f"{url} cannot be opened: Protocol not known"):
        Store(url).check()
