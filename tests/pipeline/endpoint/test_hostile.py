"""Hostile requests: each refused with its code, nothing reached, nothing told, nobody hurt."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hostile_requests import LISTENER, SECRET, Case, cases
from local_gateway import Gateway, LocalEngines, png, running_gateway
from outside import Reached, watching

from pipeline.endpoint.options import EndpointOptions, Limits
from pipeline.job import ImageOptions

CASES = cases()
LEAKS = re.compile(r"Traceback|File \"|0x[0-9a-f]{6}|site-packages|/work|/tmp|/home|/root|127\.0\.0\.1|pydantic|\.py\b")


class Listener:
    """Accepts on the loopback interface and counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.visitors = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            self.visitors += 1
            visitor.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "picture.png"
    file.write_bytes(png())
    return file


@pytest.fixture(scope="module")
def guarded(options: EndpointOptions, engines: LocalEngines) -> Iterator[Gateway]:
    """The gateway as it is by default, but for a short time for each image."""
    impatient = EndpointOptions(options.model, image=ImageOptions(upscale=False, timeout_s=3.0))
    with running_gateway(impatient, engines) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def reached() -> Iterator[Reached]:
    with watching() as reached:
        yield reached


@pytest.fixture(scope="module")
def client(guarded: Gateway) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=guarded.url, timeout=60) as client:
        yield client


def content(case: Case, model: str, listener: Listener, secret: Path) -> bytes:
    if case.raw is not None:
        return case.raw
    good = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    text = json.dumps({**good, **case.body})
    return text.replace(LISTENER, str(listener.port)).replace(SECRET, str(secret)).encode()


def test_there_are_enough() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    guarded: Gateway,
    client: httpx2.Client,
    case: Case,
    listener: Listener,
    secret: Path,
    reached: Reached,
    engines: LocalEngines,
    options: EndpointOptions,
) -> None:
    started = engines.num_started
    body = content(case, options.model_name, listener, secret)
    reached.connected.clear()
    reached.looked_up.clear()
    reached.opened.clear()
    headers = {"content-type": "application/json", **case.headers}
    reply = client.request(case.method, case.path, content=body, headers=headers)
    assert reply.status_code == case.status, reply.text[:300]
    check_error(reply, case.code)
    assert engines.num_started == started, "it reached the engine"
    assert [address for address in reached.connected if address != (guarded.host, guarded.port)] == []
    assert [name for name in reached.looked_up if name != guarded.host] == []
    assert not any(str(secret) in name or "passwd" in name for name in reached.opened)


def check_error(reply: httpx2.Response, code: str) -> None:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code or not code
    assert error["type"] == ("rate_limit_error" if reply.status_code == 429 else "invalid_request_error")
    assert 0 < len(error["message"]) < 300
    assert not LEAKS.search(error["message"])
    assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])
    assert reply.headers["content-type"] == "application/json"
    assert "server" not in reply.headers


def test_after_all_that_everything_works(
    client: httpx2.Client, listener: Listener, engines: LocalEngines, options: EndpointOptions
) -> None:
    assert listener.visitors == 0
    assert engines.worker.is_alive
    body = {"model": options.model_name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.get("/ready").json() == {"status": "ready"}
    counts = client.get("/metrics").text
    assert not re.search(r'smolvlm_requests_total{.*status="5', counts)
    assert "passwd" not in counts, "a client's path became a label"


def test_a_body_limit_holds_while_it_streams(options: EndpointOptions, engines: LocalEngines) -> None:
    limits = Limits(max_body_bytes=10_000, max_total_body_bytes=15_000)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1000
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    with (
        running_gateway(EndpointOptions(options.model, limits=limits), engines) as gateway,
        httpx2.Client(base_url=gateway.url, timeout=60) as client,
    ):
        announced = client.post("/v1/chat/completions", content=b" " * 10_001, headers=headers)
        assert announced.status_code == 413
        check_error(announced, "body_too_large")
        try:
            streamed = client.post("/v1/chat/completions", content=endless(), headers=headers)
        except httpx2.TransportError:
            pass  # the server hung up while we were still sending
        else:
            check_error(streamed, "body_too_large")
        assert sent < 1 << 30
        assert client.get("/health").status_code == 200
