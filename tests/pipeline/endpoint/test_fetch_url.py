"""Images from allowed hosts: the host is compared, resolved once, pinned, and nothing follows a redirect."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from local_gateway import LocalEngines, png, running_gateway

from pipeline.endpoint import fetch_url
from pipeline.endpoint.fetch_url import UrlFetcher, is_public
from pipeline.endpoint.images import ImageRefused
from pipeline.endpoint.options import EndpointOptions

HOST = "images.example.com"
INSIDE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
    "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::",
    "2002:a00:1::", "2001:0:53aa:64c:0:fffe:80ff:fffe", "2001:db8::1", "fec0::1",
]  # fmt: skip


class Site:
    """A web server on the loopback interface that stands for a host of the internet, and the resolver that says so."""

    def __init__(self) -> None:
        self.visits: list[tuple[str, str]] = []
        self.looked_up: list[str] = []
        self.addresses = ["127.0.0.1"]
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: None
        self.port = 0

    def resolve(self, host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        self.looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@contextmanager
def serving(site: Site) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.visits.append((self.headers["host"], self.path))
            site.answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()
    with serving(site):
        monkeypatch.setattr(socket, "getaddrinfo", site.resolve)
        yield site


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the loopback interface for the internet: nothing else can be reached from a test."""
    monkeypatch.setattr(fetch_url, "is_public", lambda address: True)


def fetch(url: str, *hosts: str, max_bytes: int = 1_000_000, timeout_s: float = 5.0) -> bytes:
    return asyncio.run(UrlFetcher(hosts, max_bytes, timeout_s).fetch(url))


def refusal(url: str, *hosts: str, **limits: Any) -> str:
    with pytest.raises(ImageRefused) as caught:
        fetch(url, *hosts, **limits)
    return caught.value.code


def respond(
    body: bytes, status: int = 200, headers: Mapping[str, str] = {}
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.usefixtures("public")
def test_an_allowed_host_is_asked_once_under_its_own_name(site: Site) -> None:
    site.answer = respond(png())
    allowed = f"{HOST}:{site.port}"
    assert fetch(f"http://{HOST}:{site.port}/a/b.png?size=2&x=%2e%2E", allowed) == png()
    assert site.visits == [(allowed, "/a/b.png?size=2&x=%2e%2E")]
    assert site.looked_up == [HOST]
    assert fetch(f"HTTP://{HOST.upper()}:{site.port}", allowed) == png()
    assert fetch(f"http://cdn.{HOST}:{site.port}/", f"*.{HOST}:{site.port}") == png()


@pytest.mark.usefixtures("public")
def test_a_request_may_name_an_image_of_an_allowed_host(
    site: Site, options: EndpointOptions, engines: LocalEngines
) -> None:
    site.answer = respond(png(30, 20))
    allowing = EndpointOptions(options.model, allowed_image_hosts=(f"{HOST}:{site.port}",))
    with running_gateway(allowing, engines) as gateway:
        for url, status in ((f"http://{HOST}:{site.port}/a.png", 200), (f"http://x.{HOST}:{site.port}/a.png", 400)):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            body = {"model": options.model_name, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            reply = httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60)
            assert reply.status_code == status, reply.text
            if status == 200:
                assert reply.json()["smolvlm"]["tiles"] == [{"rows": 0, "cols": 0, "width": 30, "height": 20}]
            else:
                assert reply.json()["error"]["code"] == "host_not_allowed"
    assert site.visits == [(f"{HOST}:{site.port}", "/a.png")]


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_networks_are_refused(site: Site, address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    site.addresses = [address]
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == "fetch_failed"
    site.addresses = ["93.184.216.34", address]  # one good address does not excuse a bad one
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == "fetch_failed"
    assert site.visits == []


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_addresses_of_the_internet_are_not(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_the_address_that_was_checked_is_the_one_connected_to(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that points elsewhere the second time is not asked a second time."""
    site.answer = respond(png())
    checked: list[str] = []

    def check(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        checked.append(str(address))
        site.addresses = ["127.0.0.2"]
        return True

    monkeypatch.setattr(fetch_url, "is_public", check)
    assert fetch(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == png()
    assert (checked, site.looked_up) == (["127.0.0.1"], [HOST])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://other.example.com/", "host_not_allowed"),
        ("http://example.com/", "host_not_allowed"),
        (f"http://{HOST}.attacker.example/", "host_not_allowed"),
        (f"http://attacker{HOST}/", "host_not_allowed"),
        (f"http://{HOST}./", "host_not_allowed"),
        (f"http://{HOST}:81/", "host_not_allowed"),
        (f"https://{HOST}:80/", "host_not_allowed"),
        (f"http://{HOST}:99999/", "unsupported_url"),
        ("http://127.0.0.1/", "host_not_allowed"),
        ("http://2130706433/", "host_not_allowed"),
        ("http://cdn.example.org.attacker.example/", "host_not_allowed"),
        ("http://example.org/", "host_not_allowed"),
        (f"http://{HOST}@127.0.0.1/", "unsupported_url"),
        (f"http://127.0.0.1@{HOST}/", "unsupported_url"),
        (f"http://{HOST}\\@127.0.0.1/", "unsupported_url"),
        (f"http://{HOST}/\r\nhost: x", "unsupported_url"),
        (f"http://{HOST}/ x", "unsupported_url"),
        (f"http://{HOST}\t/", "unsupported_url"),
        (f"http:///{HOST}/", "unsupported_url"),
        (f"http:{HOST}/", "unsupported_url"),
        ("http://[::1]/", "unsupported_url"),
        ("http://ımages.example.com/", "unsupported_url"),
        (f"ftp://{HOST}/", "unsupported_url"),
        (f"file://{HOST}/etc/passwd", "unsupported_url"),
        (f"http://{HOST}/{'x' * 2048}", "unsupported_url"),
    ],
)
def test_what_is_not_allowed_is_not_even_looked_up(site: Site, url: str, code: str) -> None:
    assert refusal(url, HOST, "*.example.org") == code
    assert site.looked_up == []


def test_without_allowed_hosts_there_is_no_fetching(site: Site) -> None:
    assert refusal(f"http://{HOST}/") == "unsupported_url"
    assert site.looked_up == []


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(site: Site, status: int) -> None:
    site.answer = respond(b"", status, {"location": f"http://127.0.0.1:{site.port}/inside"})
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == "fetch_failed"
    assert [path for _, path in site.visits] == ["/"]


@pytest.mark.usefixtures("public")
def test_proxies_of_the_environment_are_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    site.answer = respond(png())
    assert fetch(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == png()


@pytest.mark.usefixtures("public")
def test_the_body_is_counted_while_it_comes(site: Site) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            while sent < 1 << 30:
                handler.wfile.write(b"x" * 65536)
                sent += 65536
        except OSError:
            pass

    site.answer = endless
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}", max_bytes=200_000) == "too_many_bytes"
    assert sent < 100 << 20


@pytest.mark.usefixtures("public")
def test_compressed_bodies_stay_compressed(site: Site) -> None:
    import gzip

    packed = gzip.compress(bytes(10_000_000))
    site.answer = respond(packed, headers={"content-encoding": "gzip"})
    assert fetch(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == packed


@pytest.mark.usefixtures("public")
def test_a_slow_host_gets_its_time_and_no_more(site: Site) -> None:
    released = threading.Event()

    def late(_: BaseHTTPRequestHandler) -> None:
        released.wait(20)

    site.answer = late
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}", timeout_s=0.3) == "fetch_failed"
    released.set()


@pytest.mark.usefixtures("public")
def test_failures_are_all_the_same_to_the_client(site: Site) -> None:
    for status in (204, 206, 400, 404, 500):
        site.answer = respond(b"secret", status)
        assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == "fetch_failed"
    site.addresses = []
    assert refusal(f"http://{HOST}:{site.port}/", f"{HOST}:{site.port}") == "fetch_failed"
    assert refusal("http://images.example.com:1/", "images.example.com:1") == "fetch_failed"
    assert refusal(f"http://{'a' * 64}.example.com/", "*.example.com") == "fetch_failed"
