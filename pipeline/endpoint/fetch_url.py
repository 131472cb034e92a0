"""Images from hosts that the operator allows, and from nowhere else that a URL could be bent to.

The host is compared with the list, resolved once, and the connection goes to that very address: a name that changes its
mind between check and use changes nothing. Addresses inside networks are refused, redirects are not followed, proxies
of the environment are not asked, and the body is counted while it comes.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.endpoint.images import ImageRefused

MAX_URL_CHARS = 2048
_PLAIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?(/[!-\[\]-~]*)?", re.ASCII | re.IGNORECASE)  # no user, no \
_PORTS = {"http": 80, "https": 443}
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class UrlFetcher:
    """Fetches images from `hosts` (names, or `*.name` for all below; `:port` where it is not the scheme's own)."""

    def __init__(self, hosts: Sequence[str], max_bytes: int, timeout_s: float) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._max_bytes = max_bytes
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def fetch(self, url: str) -> bytes:
        """Return the body. Raises ImageRefused."""
        if not self._hosts:
            raise ImageRefused("unsupported_url")
        scheme, host, port, path = self._parts(url)
        try:
            async with asyncio.timeout(self._timeout.total):
                address = await _resolve(host, port)
                return await self._get(URL.build(scheme=scheme, host=host, port=port).join(path), address)
        except ImageRefused:
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeError):
            raise ImageRefused("fetch_failed") from None

    def _parts(self, url: str) -> tuple[str, str, int, URL]:
        if len(url) > MAX_URL_CHARS or not _PLAIN.fullmatch(url):
            raise ImageRefused("unsupported_url")
        parts = urlsplit(url)
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        try:
            port = parts.port or _PORTS[scheme]
        except ValueError:
            raise ImageRefused("unsupported_url") from None
        if not any(_matches(pattern, host, port, _PORTS[scheme]) for pattern in self._hosts):
            raise ImageRefused("host_not_allowed")
        return scheme, host, port, URL.build(path=parts.path or "/", query_string=parts.query, encoded=True)

    async def _get(self, url: URL, address: Address) -> bytes:
        connector = aiohttp.TCPConnector(resolver=_Pinned(address), use_dns_cache=False, force_close=True)
        headers = {"accept": "image/*", "accept-encoding": "identity"}
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            auto_decompress=False,
            trust_env=False,
        )
        async with session, session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise ImageRefused("fetch_failed")
            return await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._max_bytes:
                raise ImageRefused("too_many_bytes")
        return bytes(body)


class _Pinned(AbstractResolver):
    """Knows one address, whatever it is asked."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = socket.AF_INET if self._address.version == 4 else socket.AF_INET6
        return [
            ResolveResult(
                hostname=host, host=str(self._address), port=port, family=found, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        """Nothing to close."""


async def _resolve(host: str, port: int) -> Address:
    """Return the host's address, once; raises ImageRefused if any that it has lies inside a network."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(info[4][0])) for info in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ImageRefused("fetch_failed")
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether it is an address of the internet, also where IPv6 wraps an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        teredo = address.teredo[1] if address.teredo else None
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        wrapped = address.ipv4_mapped or address.sixtofour or teredo or nat64
        if wrapped is not None:
            return is_public(wrapped)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _matches(pattern: str, host: str, port: int, usual_port: int) -> bool:
    name, _, own_port = pattern.partition(":")
    if port != int(own_port or usual_port):
        return False
    return host.endswith(name[1:]) and host != name[2:] if name.startswith("*.") else host == name
