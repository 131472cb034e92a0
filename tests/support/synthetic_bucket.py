"""An S3 server whose buckets hold as many objects as their name says: it makes the listing up, a page at a time.

`s3://objects-1000000` has a million keys, each with an etag of its own and with the same image behind it.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_KEYS_PER_PAGE = 1000
_KEYS_PER_FOLDER = 10_000
_BUCKET = re.compile(r"objects-(\d+)")


def key_of(index: int) -> str:
    """Return the key of an object; keys sort by their index."""
    return f"photos/{index // _KEYS_PER_FOLDER:04}/{index:08}.png"


def etag_of(index: int) -> str:
    """Return the etag of an object: as hard to compress as real ones."""
    return hashlib.md5(str(index).encode()).hexdigest()


class SyntheticBucket(ThreadingHTTPServer):
    """Answers ListObjectsV2, GetObject and HeadObject, whatever the credentials."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, image: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.image = image
        self.pages = 0
        self.reads = 0

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that ends with its process hangs up."""


@contextmanager
def synthetic_bucket(image: bytes) -> Iterator[SyntheticBucket]:
    """Run the server in a thread for the length of the block."""
    with SyntheticBucket(image) as server:
        thread = threading.Thread(target=server.serve_forever, name="synthetic-bucket", daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: two of them wait for an acknowledgement in between
    server: SyntheticBucket

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, bucket, key = (*unquote(url.path).split("/", 2), "")[:3]
        found = _BUCKET.fullmatch(bucket)
        objects = int(found[1]) if found else 0
        if key:
            self._object(key, objects)
        else:
            self._page({name: value[0] for name, value in parse_qs(url.query).items()}, objects)

    do_HEAD = do_GET

    def _object(self, key: str, objects: int) -> None:
        stem = key.rpartition("/")[2].removesuffix(".png")
        if not stem.isdecimal() or int(stem) >= objects or key != key_of(int(stem)):
            self._answer(404, "application/xml", b"<Error><Code>NoSuchKey</Code></Error>")
            return
        self.server.reads += 1
        self._answer(200, "image/png", self.server.image, ETag=f'"{etag_of(int(stem))}"')

    def _page(self, query: dict[str, str], objects: int) -> None:
        self.server.pages += 1
        start = int(query.get("continuation-token", "0"))
        stop = min(start + min(int(query.get("max-keys", _KEYS_PER_PAGE)), _KEYS_PER_PAGE), objects)
        if not key_of(0).startswith(query.get("prefix", "").rstrip("/").partition("/")[0]):
            stop = start
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if start < stop < objects else ""
        head = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}"
        entries = "".join(self._entry(index) for index in range(start, stop))
        body = f'<?xml version="1.0"?><ListBucketResult>{head}{entries}</ListBucketResult>'
        self._answer(200, "application/xml", body.encode())

    def _entry(self, index: int) -> str:
        return (
            f"<Contents><Key>{key_of(index)}</Key><LastModified>2026-11-25T12:00:00.000Z</LastModified>"
            f"<ETag>&quot;{etag_of(index)}&quot;</ETag><Size>{len(self.server.image)}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )

    def _answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
