"""Keys, limits and patience: what stands before the routes, on real sockets."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from local_gateway import Gateway, LocalEngines, data_url, png, running_gateway
from PIL import Image

from pipeline.endpoint.client import (
    EngineClient,
    EngineRequest,
    EngineStatus,
    EngineUnavailable,
    Event,
    Finished,
    TokenOut,
)
from pipeline.endpoint.options import EndpointOptions, Limits, check_exposure
from pipeline.errors import ConfigError
from pipeline.job import Model

KEY = "sk-0123456789abcdef"
CHAT = "/v1/chat/completions"
ROUTES = [
    ("GET", "/"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", CHAT), ("GET", CHAT), ("GET", "/ready"),
    ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/none"), ("OPTIONS", "/"), ("GET", "/health/"),
    ("GET", "//health"), ("GET", "/HEALTH"), ("GET", "/health%2f"), ("GET", "/;/health"),
]  # fmt: skip
WRONG = [None, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Basic eDp5", KEY, f"Token {KEY}"]


class StuckEngines:
    """Engines that take every request and answer when told to, or say that they are gone."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.gone: EngineUnavailable | None = None
        self.tokens_before = 0
        self.open = 0

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        self.open += 1
        try:
            for _ in range(self.tokens_before):
                yield [TokenOut(0, 300, -1.0, ())]
            if self.gone is not None:
                raise self.gone
            while not self.go.is_set():  # set from another thread
                await asyncio.sleep(0.005)
            yield [TokenOut(0, 300, -1.0, ())]
            yield [Finished(0, "stop", 0.1, 0.2, 0)]
        finally:
            self.open -= 1

    async def statuses(self) -> list[EngineStatus]:
        raise EngineUnavailable("none")


@pytest.fixture(scope="module")
def locked(options: EndpointOptions, engines: LocalEngines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    with running_gateway(options, engines, file) as gateway:
        yield gateway.url


@pytest.fixture
def stuck() -> StuckEngines:
    return StuckEngines()


@contextmanager
def limited(model: Model, engines: EngineClient, **limits: Any) -> Iterator[Gateway]:
    with running_gateway(EndpointOptions(model, limits=Limits(**limits)), engines) as gateway:
        yield gateway


def question(model: Model, **more: Any) -> dict[str, Any]:
    return {"model": Path(model.id).name, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 3, **more}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_key_every_route_is_closed(locked: str, method: str, path: str) -> None:
    with httpx2.Client(timeout=30) as client:
        for header in WRONG:
            headers = {} if header is None else {"authorization": header}
            reply = client.request(method, httpx2.URL(locked).copy_with(raw_path=path.encode()), headers=headers)
            assert reply.status_code == 401, header
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in reply.text
            assert reply.headers["www-authenticate"] == ('Basic realm="smolvlm"' if path == "/" else "Bearer")


def test_health_alone_is_open(locked: str) -> None:
    reply = httpx2.get(f"{locked}/health", timeout=30)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_with_a_key_everything_opens(locked: str, model: Model) -> None:
    with httpx2.Client(base_url=locked, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        assert client.post(CHAT, json=question(model)).status_code == 200
        for path in ("/v1/models", "/ready", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/models", headers={"host": "vlm.example.com"}).status_code == 200
    page = httpx2.get(f"{locked}/", auth=("anyone", KEY), timeout=30)
    assert "<html" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_open_to_others_without_keys_needs_the_word(model: Model, host: str) -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        check_exposure(EndpointOptions(model, host=host))
    check_exposure(EndpointOptions(model, host=host, insecure=True))
    check_exposure(EndpointOptions(model, host=host, api_key_file="/somewhere"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.9"])
def test_at_home_no_keys_are_needed(model: Model, host: str) -> None:
    check_exposure(EndpointOptions(model, host=host))


def test_beyond_the_queue_limit_it_is_429_with_retry_after(model: Model, stuck: StuckEngines) -> None:
    async def flood(gateway: Gateway) -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=30) as client:
            waiting = [asyncio.ensure_future(client.post(CHAT, json=question(model))) for _ in range(3)]
            while stuck.open < 3:
                await asyncio.sleep(0.005)
            refused = [await client.post(CHAT, json=question(model, stream=n % 2 == 0)) for n in range(6)]
            assert (await client.get("/health")).status_code == 200
            stuck.go.set()
            answered = await asyncio.gather(*waiting)
            assert [reply.status_code for reply in answered] == [200] * 3
            assert (await client.post(CHAT, json=question(model))).status_code == 200
            return refused

    with limited(model, stuck, max_requests=3) as gateway:
        for reply in asyncio.run(flood(gateway)):
            assert reply.status_code == 429
            assert int(reply.headers["retry-after"]) >= 1
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


def test_bodies_under_way_are_counted_together(model: Model, stuck: StuckEngines) -> None:
    big = question(model, user="x" * 500, messages=[{"role": "user", "content": "x" * 1800}])

    async def flood(gateway: Gateway) -> None:
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=30) as client:
            first = asyncio.ensure_future(client.post(CHAT, json=big))
            while not stuck.open:
                await asyncio.sleep(0.005)
            assert (await client.post(CHAT, json=big)).status_code == 429
            stuck.go.set()
            assert (await first).status_code == 200
            assert (await client.post(CHAT, json=big)).status_code == 200

    with limited(model, stuck, max_total_body_bytes=4000) as gateway:
        asyncio.run(flood(gateway))


def test_tiles_under_way_are_counted_together(model: Model, stuck: StuckEngines) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(png(64, 64))}}  # 2 × 2 tiles and the whole
    three = question(model, messages=[{"role": "user", "content": [part] * 3}])
    one = question(model, messages=[{"role": "user", "content": [part]}])

    async def flood(gateway: Gateway) -> None:
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=30) as client:
            first = asyncio.ensure_future(client.post(CHAT, json=three))
            while not stuck.open:
                await asyncio.sleep(0.005)
            for _ in range(3):  # what a refused request had taken is given back
                assert (await client.post(CHAT, json=three)).status_code == 429
            second = asyncio.ensure_future(client.post(CHAT, json=one))
            while stuck.open < 2:
                await asyncio.sleep(0.005)
            stuck.go.set()
            assert [(await each).status_code for each in (first, second)] == [200, 200]
            assert (await client.post(CHAT, json=three)).status_code == 200

    with limited(model, stuck, max_total_tiles=22) as gateway:
        asyncio.run(flood(gateway))


def test_lost_engines_are_503_with_retry_after(model: Model, stuck: StuckEngines) -> None:
    stuck.gone = EngineUnavailable("ActorDiedError: 10.0.0.7 pid=123")
    with limited(model, stuck) as gateway, httpx2.Client(base_url=gateway.url, timeout=30) as client:
        for stream in (True, False):
            reply = client.post(CHAT, json=question(model, stream=stream))
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "engine_unavailable"
            assert "10.0.0.7" not in reply.text
        stuck.tokens_before = 3
        assert client.post(CHAT, json=question(model)).status_code == 503
        broken = client.post(CHAT, json=question(model, stream=True))
        assert broken.status_code == 200
        events = [event for event in broken.text.split("\n\n") if event]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert "[DONE]" not in broken.text
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200


def test_engines_that_say_nothing_are_given_up(model: Model, stuck: StuckEngines) -> None:
    with limited(model, stuck, first_token_timeout_s=0.2, request_timeout_s=0.5) as gateway:
        for more, status in (({"stream": True}, 503), ({"stop": "x"}, 503), ({}, 504)):
            assert httpx2.post(gateway.url + CHAT, json=question(model, **more), timeout=30).status_code == status
        stuck.tokens_before = 1
        assert httpx2.post(gateway.url + CHAT, json=question(model), timeout=30).status_code == 504
        streamed = httpx2.post(gateway.url + CHAT, json=question(model, stream=True), timeout=30)
        assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert stuck.open == 0


def connect(gateway: Gateway) -> socket.socket:
    return socket.create_connection((gateway.host, gateway.port), timeout=20)


CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
).encode()


def is_closed(connection: socket.socket) -> bool:
    """Wait for the server to hang up."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: y\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea",
    ],
)
def test_a_head_that_never_ends_is_hung_up_on(model: Model, stuck: StuckEngines, beginning: bytes) -> None:
    with limited(model, stuck, header_timeout_s=0.3) as gateway, connect(gateway) as connection:
        connection.sendall(beginning)
        started = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - started < 15


def test_one_byte_at_a_time_gains_no_time(model: Model, stuck: StuckEngines) -> None:
    with limited(model, stuck, header_timeout_s=0.5) as gateway, connect(gateway) as connection:
        started = time.monotonic()
        try:
            while time.monotonic() - started < 15:
                connection.sendall(b"a")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - started < 10


def test_a_body_that_never_ends_is_408(model: Model, stuck: StuckEngines) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with limited(model, stuck, body_timeout_s=0.3) as gateway, connect(gateway) as connection:
        connection.sendall(head.encode() + b'{"model":')
        assert b" 408 " in connection.recv(65536).split(b"\r\n")[0]
        assert is_closed(connection)
        assert httpx2.get(f"{gateway.url}/health", timeout=20).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5, 6\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost : localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n host: localhost\r\n\r\n",
        b"GET\x00/health HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 64 + b"\r\n\r\n",
    ],
    ids=range(14),
)
def test_malformed_http_is_400_or_no_answer(gateway: Gateway, head: bytes) -> None:
    with connect(gateway) as connection:
        try:
            connection.sendall(head)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0] or b" 501 " in answer.split(b"\r\n")[0]
    assert httpx2.get(f"{gateway.url}/health", timeout=20).status_code == 200


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"y" * 1000),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n", b"x: y\r\n" * 100),
        (b"GET /", b"a" * 1000),
        (CHUNKED + b"1\r\n{\r\n0\r\nx: ", b"y" * 1000),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 100),
        (CHUNKED + b"1;x=", b"y" * 1000),
    ],
    ids=["header", "headers", "path", "trailer", "trailers", "chunk extension"],
)
def test_what_comes_in_pieces_has_an_end_too(gateway: Gateway, beginning: bytes, more: bytes) -> None:
    """The time that a request has would let far more through than memory holds."""
    sent = 0
    with connect(gateway) as connection:
        connection.sendall(beginning)
        with suppress(ConnectionError):
            while sent < 1 << 20:
                sent += connection.send(more)
                time.sleep(0.002)
    assert sent < 1 << 20
    assert httpx2.get(f"{gateway.url}/health", timeout=20).status_code == 200


def test_chunks_and_kept_connections_are_taken(gateway: Gateway, model: Model) -> None:
    body = json.dumps(question(model, max_tokens=1)).encode()
    with closing(HTTPConnection(gateway.host, gateway.port, timeout=20)) as connection:
        parts, headers = (body[:20], body[20:]), {"content-type": "application/json"}
        connection.request("POST", CHAT, iter(parts), headers, encode_chunked=True)
        assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] == 1
        kept = connection.sock
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        assert connection.sock is kept


def test_a_client_that_waits_to_be_told_is_told(gateway: Gateway, model: Model) -> None:
    body = json.dumps(question(model)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"
    with connect(gateway) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


def test_answers_without_a_body_end_too(gateway: Gateway) -> None:
    with closing(HTTPConnection(gateway.host, gateway.port, timeout=20)) as connection:
        for method, status in (("HEAD", 405), ("GET", 200), ("HEAD", 405)):
            connection.request(method, "/health")
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, method == "GET")


def test_connections_are_counted(model: Model, stuck: StuckEngines) -> None:
    with limited(model, stuck, max_connections=8, header_timeout_s=5.0) as gateway:
        held = [connect(gateway) for _ in range(8)]
        time.sleep(0.2)
        with connect(gateway) as beyond:
            assert is_closed(beyond)
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert httpx2.get(f"{gateway.url}/health", timeout=20).status_code == 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_tiny_images_of_every_mode_are_answered(http: httpx2.Client, model: Model, mode: str, tmp_path: Path) -> None:
    sizes = [(w, h) for w in (1, 2, 3, 4, 8) for h in (1, 3, 4, 8)]
    kind = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    for start in range(0, len(sizes), 10):
        parts = []
        for number, size in enumerate(sizes[start : start + 10]):
            image = Image.fromarray(np.zeros((size[1], size[0]), np.uint8)).convert("L" if mode == "PA" else mode)
            path = tmp_path / f"{number}.{kind}"
            (image if mode != "PA" else image.convert("P").convert("PA")).save(path, kind)
            parts.append({"type": "image_url", "image_url": {"url": data_url(path.read_bytes())}})
        reply = http.post(CHAT, json=question(model, messages=[{"role": "user", "content": parts}]))
        assert reply.status_code == 200, reply.text
        assert [(t["width"], t["height"]) for t in reply.json()["smolvlm"]["tiles"]] == sizes[start : start + 10]


def test_a_decoder_that_dies_costs_one_image(gateway: Gateway, http: httpx2.Client, model: Model) -> None:
    import os
    import signal

    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(png())}}]}]
    assert http.post(CHAT, json=question(model, messages=picture)).status_code == 200
    for pid in gateway.decoders.pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    for _ in range(4):
        assert http.post(CHAT, json=question(model, messages=picture)).status_code == 200


def test_metrics_count_what_happened(model: Model, engines: LocalEngines) -> None:
    with limited(model, engines) as gateway, httpx2.Client(base_url=gateway.url, timeout=30) as client:
        prompt_tokens = 0
        for stream in (False, True):
            client.post(CHAT, json=question(model, stream=stream))
        prompt_tokens = client.post(CHAT, json=question(model)).json()["usage"]["prompt_tokens"]
        client.post(CHAT, json={})
        client.get("/none/../../etc")
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines[f'smolvlm_requests_total{{route="{CHAT}",status="200"}}'] == "3.0"
    assert lines[f'smolvlm_requests_total{{route="{CHAT}",status="400"}}'] == "1.0"
    assert lines['smolvlm_requests_total{route="none",status="404"}'] == "1.0"
    assert lines["smolvlm_request_seconds_count"] == "4.0"
    assert lines["smolvlm_first_token_seconds_count"] == "3.0"
    assert float(lines['smolvlm_tokens_total{kind="prompt"}']) == 3 * prompt_tokens
    assert lines["smolvlm_requests_in_flight"] == "0.0"
    assert lines['smolvlm_engine_alive{engine="engine-1"}'] == "1.0"
    for name in ("online", "batch"):
        assert lines[f'smolvlm_engine_sequences{{class="{name}",engine="engine-1",state="waiting"}}'] == "0.0"
    assert 0 <= float(lines['smolvlm_engine_kv_use{engine="engine-1"}']) <= 1
    assert float(lines['smolvlm_engine_online_requests_total{engine="engine-1"}']) >= 3
