"""Pictures made for a test, and a web server that serves them well and badly."""

import io
import json
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdm_models.data.config import DataConfig
from mdm_models.data.shards import ShardedSamples, open_shards
from tests.made_data import encode_clip


def encode_image(form: str = "JPEG", width: int = 24, height: int = 16, mode: str = "RGB", **options) -> bytes:
    """Noise, so that no size can shrink unnoticed."""
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, format=form, **options)
    return file.getvalue()


def package(path: Path, name: str, files: dict[str, bytes]) -> Path:
    """An npm tarball of that name."""
    with tarfile.open(path, "w:gz") as tar:
        for file, data in ({"package.json": json.dumps({"name": name}).encode()} | files).items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key → files of all samples of a folder of shards, as training reads them."""
    samples = ShardedSamples(open_shards(DataConfig((str(folder),))))
    return {samples[i]["__key__"]: samples[i] for i in range(len(samples))}


class Site:
    """A web server on this machine. `asked` counts the requests for each path."""

    def __init__(self):
        self.files = {"/a.jpg": encode_image(), "/b.png": encode_image("PNG"), "/clip.mp4": encode_clip()}
        self.asked: Counter[str] = Counter()
        self.released = threading.Event()  # what /held waits for
        self.open = self.most_open = 0
        self._lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with site._lock:
                    site.open += 1
                    site.most_open = max(site.most_open, site.open)
                    site.asked[self.path] += 1
                try:
                    site.answer(self, self.path.partition("?")[0])
                except OSError:
                    pass  # the client has gone, as some tests want
                finally:
                    with site._lock:
                        site.open -= 1

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        image = self.files["/a.jpg"]
        if path in self.files:
            _send(request, 200, self.files[path])
        elif path == "/page":
            _send(request, 200, b"<!DOCTYPE html><html>gone</html>")
        elif path == "/moved":
            _send(request, 302, b"", Location="/a.jpg")
        elif path == "/loop":
            _send(request, 302, b"", Location="/loop")
        elif path == "/busy-once":
            first = self.asked[path] == 1
            _send(request, 503 if first else 200, b"" if first else image, **{"Retry-After": "0"})
        elif path == "/noai":
            _send(request, 200, image, **{"X-Robots-Tag": "noai, noimageai"})
        elif path == "/truncated":
            _send(request, 200, image[:100], length=len(image))
            request.close_connection = True
        elif path == "/huge":
            _send(request, 200, b"", length=10**12)
            request.close_connection = True
        elif path == "/endless":
            _send(request, 200, b"", length=None)
            while True:
                request.wfile.write(bytes(1 << 16))
        elif path == "/trickle":
            _send(request, 200, b"", length=len(image))
            for byte in image:
                request.wfile.write(bytes([byte]))
                time.sleep(0.02)
        elif path == "/held":
            self.released.wait(60)
            _send(request, 200, image)
        elif path == "/slow":
            time.sleep(0.2)
            _send(request, 200, image)
        else:
            _send(request, 404, b"")


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, *, length: int | None = -1, **headers) -> None:
    """length: what is claimed; -1: the truth, None: nothing."""
    request.send_response(status)
    if length is not None:
        request.send_header("Content-Length", str(len(body) if length == -1 else length))
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()
