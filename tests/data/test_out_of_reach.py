"""A store that cannot be asked is found out soon, and does not keep from what has been copied."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("mdm_models.data.shards.WAITS_AT_START", (0, 0))


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
    with pytest.raises(DataError, match="8 of 24 shards"):
        open_shards(config)
    assert time.monotonic() - begun < 20  # 108 before, on a quiet machine


class Answers(BaseHTTPRequestHandler):
    """Answers as the first part of a URL's path says: with a status, by sending elsewhere and back, never, or with the
    beginning of a file."""

    quiet = threading.Event()

    def do_GET(self):
        how = self.path.split("/")[1]
        if how == "silent":
            self.quiet.wait(30)
            return
        self.send_response(int(how) if how.isdecimal() else 200)
        self.send_header("Content-Length", "10240" if how == "stalled" else "0")
        self.send_header("Location", self.path)
        self.end_headers()
        if how == "stalled":
            self.wfile.flush()
            self.quiet.wait(30)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    """The URL of a server that `Answers`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as served:
        served.daemon_threads = True
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        Answers.quiet.set()
        served.shutdown()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("403", "ClientResponseError: 403, message='Forbidden'"),
        ("503", "ClientResponseError: 503, message='Service Unavailable'"),
        ("302", "TooManyRedirects: "),
        ("silent", "there is no answer"),
        ("stalled", "there is no answer"),
    ],
)
def test_why_a_url_cannot_be_reached_is_said_soon(place, said, server, tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(locations, "ANSWER", 2)
    monkeypatch.setattr(locations, "SILENCE", 0.5)
    config = DataConfig((f"{server}/{place}/{{00..23}}.tar",), cache=str(tmp_path / "cache"))
    begun = time.monotonic()
    with pytest.raises(DataError, match=f"8 of 24 shards, among them {server}/{place}/00.tar, cannot be .*{said}"):
        open_shards(config)
    assert time.monotonic() - begun < 25  # five minutes for each before, where nothing came


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zz://a/b.tar", "data: zz://a/b.tar cannot be opened: Protocol not known: zz"),
        ("ftp://127.0.0.1:9/b.tar", "1 of 1 shards, among them ftp://127.0.0.1:9/b.tar, cannot be reached: .*refused"),
        ("https://{server}/b.tar", "1 of 1 shards, among them https://127.*, cannot be reached: ClientConnector.*SSL"),
    ],
)
def test_a_store_that_takes_no_connection_is_named(name, said, server, tmp_path, impatient):
    name = name.format(server=server.removeprefix("http://"))
    with pytest.raises(DataError, match=said):
        open_shards(DataConfig((name,), cache=str(tmp_path / "cache")))


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
