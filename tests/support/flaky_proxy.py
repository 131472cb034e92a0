"""An HTTP proxy before a store that fails a seeded share of the requests, the way stores and networks do."""

import http.client
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class FlakyProxy(ThreadingHTTPServer):
    """Forwards to `upstream`; of the requests, `unavailable` get a 503, `reset` a reset, `short` half of their body."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, unavailable: float, reset: float, short: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.shares = (unavailable, reset, short)
        self.requests = 0
        self.faults = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str | None:
        """Count one request and say what shall happen to it."""
        with self._lock:
            self.requests += 1
            (fault,) = self._random.choices(["503", "reset", "short", None], [*self.shares, 1 - sum(self.shares)])
            self.faults += fault is not None
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw()
        if fault == "503":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self._forward(body, fault == "short")

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _forward(self, body: bytes, short: bool) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        upstream.request(self.command, self.path, body, headers)
        reply = upstream.getresponse()
        data = reply.read()
        upstream.close()
        self._answer(reply.status, reply.getheaders(), data, short)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, short: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {*_HOP_BY_HOP, "content-length"}:
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if short else data)
        if short:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def flaky_proxy(
    upstream: str, unavailable: float = 0.2, reset: float = 0.05, short: float = 0.05, seed: int = 0
) -> Iterator[FlakyProxy]:
    """Run the proxy until the block ends."""
    proxy = FlakyProxy(upstream, unavailable, reset, short, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
