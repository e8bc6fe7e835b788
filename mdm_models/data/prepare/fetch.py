"""Downloads that end: in the bytes, or in a reason why not."""

import threading
import time

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    ResponseError,
    SSLError,
)

from mdm_models.data.media import BadSample

REDIRECTS = 5
SILENCE = 10.0  # seconds that a server may take to accept a connection, or between two pieces of an answer
BUSY = (429, 500, 502, 503, 504)  # answers that may differ a moment later
LONGEST_WAIT = 30.0  # seconds before an attempt, whatever Retry-After asks for
OUTAGE = 500  # downloads in a row that reach no server; so many are not the list's fault
CHUNK = 1 << 16


class _Passing(Exception):
    """A failure that may be gone at the next attempt, `wait` seconds later if the server said so."""

    def __init__(self, reason: str, detail: str, wait: float | None = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.wait = reason, detail, wait


class Downloader:
    """Fetches URLs from any number of threads; no host sees more than `per_host` connections at a time.

    timeout: seconds that one download may last; largest: bytes; retries: further attempts after a failure that may
    pass (a busy server, a broken connection, silence), 1, 2, 4, … seconds apart or as the server asks.
    """

    def __init__(self, *, per_host: int, timeout: float, largest: int, retries: int, user_agent: str):
        self.timeout = timeout
        self.largest = largest
        self.retries = retries
        self._pool = urllib3.PoolManager(
            num_pools=1000,
            maxsize=per_host,
            block=True,  # further requests to the host wait
            headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
            timeout=urllib3.Timeout(SILENCE),
            retries=urllib3.Retry(total=REDIRECTS, connect=0, read=0, other=0, respect_retry_after_header=False),
        )
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._unreached = 0  # downloads in a row

    def close(self) -> None:
        """End the downloads that are under way."""
        self._closed.set()

    def fetch(self, url: str) -> bytes:
        """Download the bytes at a URL. Raises BadSample, and OSError if the last OUTAGE downloads have all reached no
        server."""
        if not url.lower().startswith(("http://", "https://")):
            raise BadSample("bad URL", url)
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(url)
            except _Passing as failure:
                pause = min(LONGEST_WAIT, 2**attempt if failure.wait is None else failure.wait)
                if attempt == self.retries or self._closed.wait(pause):
                    raise BadSample(failure.reason, failure.detail) from None
        raise AssertionError  # the loop returns or raises

    def _attempt(self, url: str) -> bytes:
        response = self._answer(url)
        try:
            if response.status in BUSY:
                wait = response.headers.get("Retry-After", "")
                raise _Passing(f"HTTP {response.status}", url, float(wait) if wait.isdecimal() else None)
            if response.status != 200:
                raise BadSample(f"HTTP {response.status}", url)
            tags = response.headers.get("X-Robots-Tag", "").lower()
            if "noai" in tags or "noimageai" in tags:
                raise BadSample("forbidden by X-Robots-Tag", url)
            return self._body(response, url)
        finally:
            response.close()
            response.release_conn()

    def _answer(self, url: str) -> urllib3.BaseHTTPResponse:
        """The server's answer, its body yet unread."""
        try:
            response = self._pool.request("GET", url, preload_content=False)
        except ValueError as error:
            raise BadSample("bad URL", f"{url}: {error}") from None
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) else error
            if isinstance(reason, ResponseError):
                raise BadSample("too many redirects", url) from None
            if isinstance(reason, SSLError):
                raise BadSample("bad certificate", f"{url}: {reason}") from None
            self._count_unreached()
            if isinstance(reason, NameResolutionError):
                raise BadSample("unknown host", url) from None
            refused = isinstance(reason, NewConnectionError)  # which urllib3 has as a kind of ConnectTimeoutError
            if isinstance(reason, ConnectTimeoutError | ReadTimeoutError) and not refused:
                raise _Passing("timed out", url) from None
            raise _Passing("connection failed", f"{url}: {reason}") from None
        with self._lock:
            self._unreached = 0
        return response

    def _count_unreached(self) -> None:
        with self._lock:
            self._unreached += 1
            if self._unreached >= OUTAGE:
                raise OSError(f"the last {OUTAGE} downloads reached no server; is the network up? Then run this again")

    def _body(self, response: urllib3.BaseHTTPResponse, url: str) -> bytes:
        expected = response.headers.get("Content-Length", "")
        if expected.isdecimal() and int(expected) > self.largest:
            raise BadSample("too large", f"{url}: {expected} bytes")
        deadline = time.monotonic() + self.timeout
        data = bytearray()
        try:
            while piece := response.read1(CHUNK):  # what has come: a trickle cannot outlast the deadline
                data += piece
                if len(data) > self.largest:
                    raise BadSample("too large", f"{url}: more than {self.largest} bytes")
                if time.monotonic() > deadline or self._closed.is_set():
                    raise _Passing("timed out", f"{url}: {len(data)} bytes in {self.timeout:g} s")
        except ReadTimeoutError:
            raise _Passing("timed out", url) from None
        except HTTPError as error:
            raise _Passing("truncated", f"{url}: {error}") from None
        return bytes(data)
