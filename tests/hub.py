"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it for hf:// URLs of one repository of data.

It speaks of files as the Hub does (information, listing, ranges) and takes commits, with what they hold in them or sent
by LFS beforehand. It knows nothing of Xet, which HF_HUB_DISABLE_XET turns off, nor of who asks.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "datasets/somebody/data"
SMALL = 1000  # bytes; larger files go by LFS


class Hub(ThreadingHTTPServer):
    """files: path → what is in it; commits: what each changed."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """In which huggingface_hub finds it."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_anything"}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, whose head and body are sent apart, waits for 40 ms

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path, files = unquote(urlsplit(self.path).path), self.server.files
        if path in (f"/api/{REPOSITORY}", f"/api/{REPOSITORY}/revision/main"):
            return self._say({"id": REPOSITORY.partition("/")[2], "sha": self._sha(), "private": False, "siblings": []})
        if path.startswith(f"/{REPOSITORY}/resolve/main/"):
            return self._send_file(path.removeprefix(f"/{REPOSITORY}/resolve/main/"))
        if path.startswith(f"/api/{REPOSITORY}/tree/main"):
            folder = path.removeprefix(f"/api/{REPOSITORY}/tree/main").strip("/")
            below = f"{folder}/" if folder else ""
            if folder and not any(name.startswith(below) for name in files):
                return self._missing("EntryNotFound")
            whole = parse_qs(urlsplit(self.path).query).get("recursive") in (["true"], ["True"])
            found = [name for name in self._names() if name.startswith(below)]
            return self._say([self._told(name) for name in found if whole or "/" not in name.removeprefix(below)])
        self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == f"/api/{REPOSITORY}/paths-info/main":
            return self._say([self._told(name) for name in parse_qs(body.decode())["paths"] if name in self._names()])
        if path == f"/api/{REPOSITORY}/preupload/main":
            modes = [(file["path"], "lfs" if file["size"] > SMALL else "regular") for file in json.loads(body)["files"]]
            return self._say(
                {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
            )
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            sent = [{"href": f"{self.server.url}/lfs/{each['oid']}"} for each in wanted]
            objects = [each | {"actions": {"upload": to}} for each, to in zip(wanted, sent, strict=True)]
            return self._say({"transfer": "basic", "objects": objects})
        if path == f"/api/{REPOSITORY}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
            return self._say({"commitUrl": f"{self.server.url}/{REPOSITORY}/commit/x", "commitOid": self._sha()})
        self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == name
        self.server.objects[name] = data
        self._say({})

    def _commit(self, lines: list[dict]) -> None:
        files, changed = self.server.files, []
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            if kind != "header":
                changed.append(value["path"])
        self.server.commits.append(changed)

    def _names(self) -> list[str]:
        """Of all files and folders."""
        parts = [name.split("/") for name in list(self.server.files)]
        return sorted({"/".join(part[:length]) for part in parts for length in range(1, len(part) + 1)})

    def _told(self, name: str) -> dict:
        data = self.server.files.get(name)
        if data is None:
            return {"type": "directory", "path": name, "oid": "0" * 40}
        oid = hashlib.sha256(data).hexdigest()
        told = {"type": "file", "path": name, "size": len(data), "oid": oid[:40]}
        return told | ({"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if len(data) > SMALL else {})

    def _sha(self) -> str:
        return f"{len(self.server.commits):040x}"

    def _send_file(self, name: str) -> None:
        if name not in self.server.files:
            return self._missing("EntryNotFound")
        data = self.server.files[name]
        first, last = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        part = data[first : last + 1]
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self._sha())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def _say(self, answer: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._say({"error": "not found"}, 404, **{"X-Error-Code": code})
