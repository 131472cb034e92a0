"""The HTTP server: uvicorn, with bounds on what a connection may hold without having asked anything."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipeline.endpoint.options import Limits

MAX_HEAD_BYTES = 16 << 10
KEEP_ALIVE_S = 30
BACKLOG = 512
TOO_LARGE = f"The head of a request may have {MAX_HEAD_BYTES} bytes."
CONTINUE = b"HTTP/1.1 100 "
LINGER_S = 2.0  # for a client that is still sending what was refused: hung up on, it might never read why


class HttpServer:
    """Serves `app` on a bound socket, on the running event loop, until it is stopped."""

    def __init__(self, app: ASGIApp, bound: socket.socket, limits: Limits, drain_s: int) -> None:
        config = uvicorn.Config(
            app,
            http=_bounded_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody's word about who is asking
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s,
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[bound]))

    @property
    def is_serving(self) -> bool:
        """Whether it still takes connections."""
        return not self._serving.done()

    async def stop(self) -> None:
        """Take no more connections, let requests under way finish within `drain_s`, and end."""
        self._server.should_exit = True
        await self._serving


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a listening socket. `shared` lets another gateway on this machine take the same port, so that a new one
    is there before the old one goes. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


def _check_head(url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """What the parser lets pass: a head of any size that came at once, other than one host, codings besides chunked.
    Raises ValueError."""
    if len(url) + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        raise ValueError(TOO_LARGE)
    if sum(name == b"host" for name, _ in headers) != 1:
        raise ValueError("A request names one host.")
    if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in headers):
        raise ValueError("A body may be chunked, and nothing else.")


class _HeadWithBody(asyncio.Transport):
    """What a response is written to: its head waits for the first of its body, of which uvicorn writes at least an
    empty one. Two messages cost twice the way, and wake a client up for a head alone."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def is_closing(self) -> bool:
        """Whether the connection is."""
        return self._transport.is_closing()

    def write(self, data: Any) -> None:
        """Send it, or keep a head, which comes first."""
        if self._head is None and not data.startswith(CONTINUE):
            self._head = data
            return
        head, self._head = self._head or b"", b""
        self._transport.write(head + data)

    def close(self) -> None:
        """Close the connection after what was kept."""
        self._transport.write(self._head or b"")
        self._transport.close()


def _bounded_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn waits for a request for ever and keeps whatever comes before its body; this protocol does not, and counts
    connections."""

    class BoundedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _has_begun = _in_body = False  # a request, as far as it has arrived
        _idle_bytes = 0  # received since the last of a body: of a head, a chunk's extension, a trailer

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._idle_bytes += len(data)
            super().data_received(data)
            if self._idle_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(TOO_LARGE)
            self._watch()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._has_begun = True

        def on_headers_complete(self) -> None:
            _check_head(self.url, self.headers)  # what it raises becomes a 400
            super().on_headers_complete()
            if self.scope["method"] != "HEAD":
                self.cycle.transport = _HeadWithBody(self.transport)
            self._in_body, self._idle_bytes = True, 0

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            self._idle_bytes = 0

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._has_begun, self._in_body, self._idle_bytes = False, False, 0

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._has_begun:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """The time of an unfinished head, or of a body that nobody wants any more, runs from its first byte."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._deadline is None:
                seconds = LINGER_S if self._in_body else limits.header_timeout_s
                self._deadline = self.loop.call_later(seconds, self._give_up)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return BoundedProtocol
