import socket
import threading
import time

import pytest

from mdm_models.data.media import BadSample
from mdm_models.data.prepare import fetch
from mdm_models.data.prepare.fetch import Downloader

LARGEST = 100_000


def downloader(**changes) -> Downloader:
    settings = {"per_host": 4, "timeout": 5.0, "largest": LARGEST, "retries": 0, "user_agent": "test"}
    return Downloader(**(settings | changes))


def test_a_file_comes_as_it_is(site):
    assert downloader().fetch(f"{site.url}/a.jpg") == site.files["/a.jpg"]


def test_a_redirection_is_followed(site):
    assert downloader().fetch(f"{site.url}/moved") == site.files["/a.jpg"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "HTTP 404"),
        ("/loop", "too many redirects"),
        ("/truncated", "truncated"),
        ("/huge", "too large"),
        ("/endless", "too large"),
        ("/noai", "forbidden by X-Robots-Tag"),
    ],
)
def test_a_failed_download_has_a_reason(site, path, reason):
    with pytest.raises(BadSample) as failure:
        downloader().fetch(site.url + path)
    assert failure.value.reason == reason
    assert site.url in failure.value.detail


@pytest.mark.parametrize("url", ["", "ftp://host/a.jpg", "file:///etc/passwd", "http://", "http://[", "http://a b:x/"])
def test_what_is_no_url_of_the_web_is_refused(url):
    with pytest.raises(BadSample) as failure:
        downloader().fetch(url)
    assert failure.value.reason == "bad URL"


def test_a_host_that_does_not_exist_is_not_asked_again():
    begin = time.monotonic()
    with pytest.raises(BadSample) as failure:
        downloader(retries=5).fetch("http://no-such-host.invalid/a.jpg")
    assert failure.value.reason == "unknown host"
    assert time.monotonic() - begin < 1 + 2 + 4 + 8 + 16


def test_a_server_that_refuses_connections_has_not_timed_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(BadSample) as failure:
        downloader().fetch(f"http://127.0.0.1:{port}/a.jpg")
    assert failure.value.reason == "connection failed"
    assert "refused" in failure.value.detail


def test_a_trickle_ends_at_the_deadline(site):
    begin = time.monotonic()
    with pytest.raises(BadSample) as failure:
        downloader(timeout=0.3).fetch(f"{site.url}/trickle")
    assert failure.value.reason == "timed out"
    assert time.monotonic() - begin < 3


def test_a_silent_server_is_left(site, monkeypatch):
    monkeypatch.setattr(fetch, "SILENCE", 0.05)
    with pytest.raises(BadSample) as failure:
        downloader().fetch(f"{site.url}/slow")
    assert failure.value.reason == "timed out"


def test_a_busy_server_is_asked_again(site):
    assert downloader(retries=1).fetch(f"{site.url}/busy-once") == site.files["/a.jpg"]
    assert site.asked["/busy-once"] == 2


def test_a_missing_file_is_not_asked_for_again(site):
    with pytest.raises(BadSample):
        downloader(retries=3).fetch(f"{site.url}/missing")
    assert site.asked["/missing"] == 1


def test_a_host_sees_few_connections_at_a_time(site):
    polite = downloader(per_host=2)
    threads = [threading.Thread(target=polite.fetch, args=(f"{site.url}/slow?{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.most_open == 2


def test_an_outage_ends_the_run_instead_of_skipping_everything(site, monkeypatch):
    monkeypatch.setattr(fetch, "OUTAGE", 3)
    cut_off = downloader()
    for _ in range(2):
        with pytest.raises(BadSample):
            cut_off.fetch("http://127.0.0.1:9/a.jpg")
    cut_off.fetch(f"{site.url}/a.jpg")  # a server that answers ends the count
    for _ in range(2):
        with pytest.raises(BadSample):
            cut_off.fetch("http://127.0.0.1:9/a.jpg")
    with pytest.raises(OSError, match="reached no server"):
        cut_off.fetch("http://127.0.0.1:9/a.jpg")


def test_closing_ends_what_is_under_way(site):
    closing = downloader(timeout=60, retries=5)

    def fetch_to_the_end():
        with pytest.raises(BadSample):
            closing.fetch(f"{site.url}/trickle")

    thread = threading.Thread(target=fetch_to_the_end)
    thread.start()
    while not site.asked["/trickle"]:
        time.sleep(0.01)
    closing.close()
    thread.join(timeout=2)
    assert not thread.is_alive()
