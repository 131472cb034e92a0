"""What a request meets before any route: key, host, sizes, places left. Plain ASGI, so that nothing is read too early.

A refused request costs no more than its headers; a completion's body is counted while it comes, and answered whole.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.endpoint.budget import Budget, Take
from pipeline.endpoint.errors import ApiError, internal_error
from pipeline.endpoint.keys import ApiKeys
from pipeline.endpoint.metrics import Metrics
from pipeline.endpoint.options import Limits

OPEN_PATHS = ("/health",)
CHAT_PATH = "/v1/chat/completions"
SLOW_READER_S = 60.0  # beyond the time of the answer itself, for a client that reads it slowly
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")

Completions = Callable[[bytes, Request, Take], Awaitable[Response]]
"""Answers a body. The request says only whether its client is still there."""

logger = logging.getLogger("smolvlm.endpoint")


class Guard:
    """Wraps the routes, and has completions answered past them. `keys` None: everyone may ask, with `local_only` under
    a name of this machine's own, since a web page could otherwise reach the server through the browser of someone who
    sits at it."""

    def __init__(
        self,
        app: ASGIApp,
        completions: Completions,
        keys: ApiKeys | None,
        local_only: bool,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._app, self._completions = app, completions
        self._keys, self._local_only = keys, local_only
        self._limits, self._metrics = limits, metrics
        self._places = Budget(limits.max_requests)
        self._body_bytes = Budget(limits.max_total_body_bytes)
        self._tiles = Budget(limits.max_total_tiles)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        reply = _Reply(send, request_id)
        try:
            await self._admitted(scope, receive, reply)
        except ApiError as error:
            if not reply.status:
                await error.response(_challenge(scope, error))(scope, receive, reply)
        except Exception:
            logger.exception("%s failed", request_id)
            if not reply.status:
                await internal_error(request_id).response()(scope, receive, reply)
        finally:
            self._metrics.requests.labels(_route(scope), str(reply.status)).inc()

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_caller(scope, headers)
        if scope["path"] != CHAT_PATH or scope["method"] != "POST":
            await self._app(scope, _without_body(receive), send)
            return
        self._check_announced(headers)
        with self._places.share() as take_places, self._metrics.in_flight.track_inprogress():
            take_places(1)
            await self._complete(scope, receive, send)

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        if self._keys is not None and not self._keys.accept(headers.get("authorization", "").encode("latin-1")):
            raise ApiError(401, "invalid_api_key", "missing or wrong API key; send it as `Authorization: Bearer KEY`")
        host = headers.get("host", "").lower()
        if self._keys is None and self._local_only and _without_port(host) not in LOOPBACK_HOSTS:
            raise ApiError(403, "host_not_allowed", "without API keys this server answers as localhost only")

    def _check_announced(self, headers: Headers) -> None:
        """What the headers say about the body."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "unsupported_media_type", "send the body as content-type application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "unsupported_media_type", "send the body without content-encoding")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the body has more than {self._limits.max_body_bytes} bytes")

    async def _complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._body_bytes.share() as take_bytes, self._tiles.share() as take_tiles:
            body = await self._read(receive, take_bytes)
            if body is None:
                self._metrics.disconnects.inc()
                return
            try:
                with self._metrics.latency.time():
                    async with asyncio.timeout(self._limits.request_timeout_s + SLOW_READER_S):
                        response = await self._completions(body, Request(scope, receive), take_tiles)
                        await response(scope, receive, send)
            except TimeoutError:
                raise ApiError(504, "timeout", "the answer took too long") from None

    async def _read(self, receive: Receive, take_bytes: Take) -> bytes | None:
        """Gather the body within its time; None if the client leaves meanwhile."""
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self._limits.max_body_bytes:
                        raise self._too_large()  # whatever others may still send
                    take_bytes(len(chunk))
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "body_timeout", "the body took too long to arrive") from None
        return b"".join(chunks)


class _Reply:
    """Passes the response on, with the headers that all have; `status` is 0 until it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name for name, _ in message.get("headers", [])}
            added = [header for header in self._headers if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)


def _without_body(receive: Receive) -> Receive:
    """For routes that take none: what a client sends anyway is not looked at."""
    given = False

    async def empty() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return empty


def _challenge(scope: Scope, error: ApiError) -> dict[str, str]:
    """A browser that opens the page asks its user for the key, and sends it along from then on."""
    if error.status != 401:
        return {}
    return {"www-authenticate": 'Basic realm="smolvlm"' if scope["path"] == "/" else "Bearer"}


def _route(scope: Scope) -> str:
    """The route that matched; not the path, which is the client's own text."""
    if scope["path"] == CHAT_PATH:
        return CHAT_PATH
    return getattr(scope.get("route"), "path", "none")


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host
