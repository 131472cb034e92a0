"""Storage through fsspec: stream listings, read ranges, put if absent or unchanged. Every transient fault is retried.

A `Location` is a URI with its endpoint. It pickles as those two strings, so workers open their own connections.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, RowError, RowFailure

MAX_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
# Listings change under us by design, so a cached one is a wrong one.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
_S3_OPTIONS: dict[str, Any] = {
    **_OPTIONS,
    # Above 1, s3fs asks for the size before each whole read: two requests an object instead of one.
    "max_concurrency": 1,
    "config_kwargs": {
        "max_pool_connections": 64,
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 4},
    },
}

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object. `etag` changes when the content does; None where the store does not say."""

    uri: str
    size: int | None
    etag: str | None


@lru_cache(maxsize=64)
def _filesystem(protocol: str, endpoint_url: str | None) -> Any:
    is_s3 = protocol in ("s3", "s3a")
    options = dict(_S3_OPTIONS if is_s3 else _OPTIONS)
    if endpoint_url and is_s3:
        options["endpoint_url"] = endpoint_url
    try:
        return fsspec.filesystem(protocol, **options, **({"session": _s3_session()} if is_s3 else {}))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"no storage driver for {protocol}://: {error}. Install the fsspec package for it."
        ) from error


def _s3_session() -> Any:
    """A session that knows how S3 writes dates: to guess takes the library three quarters of the time of a listing."""
    from aiobotocore.session import AioSession
    from botocore.utils import parse_timestamp

    def parse(value: Any) -> datetime:
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError):  # a header's date, or a number
            guessed: datetime = parse_timestamp(value)
            return guessed

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse)
    return session


@dataclass(frozen=True)
class Location:
    """A place in a store: any fsspec URI or a local path."""

    uri: str
    endpoint_url: str | None = None

    @property
    def protocol(self) -> str:
        """Scheme of the URI; `file` for a bare path."""
        return urlsplit(self.uri).scheme if "://" in self.uri else "file"

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, shared by all locations of one store in this process."""
        return _filesystem(self.protocol, self.endpoint_url)

    @property
    def path(self) -> str:
        """The path as the filesystem wants it."""
        return str(self.fs._strip_protocol(self.uri))

    @property
    def is_remote(self) -> bool:
        """Whether a read is a network request, so that several should be under way at once."""
        return bool(getattr(self.fs, "async_impl", False))

    def child(self, name: str) -> "Location":
        """Return the location `name` below this one."""
        return Location(f"{self.uri.rstrip('/')}/{name}", self.endpoint_url)

    def at(self, uri: str) -> "Location":
        """Return another URI of the same store settings."""
        return Location(uri, self.endpoint_url)

    def list(self) -> Iterator[ObjectInfo]:
        """Yield every object below this location, page by page; nothing if there is none.

        The order is the store's own and repeats only as far as the store's does.
        """
        walk = _list_s3 if self.protocol in ("s3", "s3a") else _list_tree
        yield from walk(self)

    def info(self) -> ObjectInfo | None:
        """Return this object's size and etag, or None if there is no such object."""
        try:
            found = with_retries(lambda: self.fs.info(self.path))
        except FileNotFoundError:
            return None
        return None if found["type"] != "file" else ObjectInfo(self.uri, found.get("size"), _etag(found))

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the object's bytes from `start` to `stop`.

        An object that ends before `stop` gives what there is. Raises FileNotFoundError, PermissionError, or the last
        OSError once the retries are used up.
        """
        try:
            return bytes(with_retries(lambda: self.fs.cat_file(self.path, start=start, end=stop)))
        except Exception as error:
            if _http_status(error) == 416:  # S3 has no range in an empty object, or behind the end of any
                return b""
            raise

    def open(self, block_size: int = 1 << 20) -> Any:
        """Open the object for seeking reads of `block_size` at a time."""
        return self.fs.open(self.path, "rb", **({"block_size": block_size} if self.is_remote else {}))

    def put(self, data: bytes) -> None:
        """Write the object, replacing what is there. Readers see the old or the new content, never a part."""
        if isinstance(self.fs, LocalFileSystem):
            with _local_temporary(Path(self.path), data) as temporary:
                temporary.replace(self.path)
        else:
            with_retries(lambda: self.fs.pipe_file(self.path, data))

    def put_if_absent(self, data: bytes) -> bool:
        """Write the object in one atomic step unless it exists; return whether this call wrote it.

        A retry after a lost answer finds its own object and returns False: callers name objects after their content.
        """
        if isinstance(self.fs, LocalFileSystem):
            return _link_local(Path(self.path), data)
        try:
            with_retries(lambda: self.fs.pipe_file(self.path, data, mode="create"))
        except Exception:
            if self.info() is not None:
                return False
            raise
        return True

    def replace(self, data: bytes, etag: str) -> bool:
        """Write the object in one atomic step if it is still the version `etag`; return whether it holds `data` now.

        S3 and compatible stores compare by themselves (`If-Match`). Elsewhere this call compares just before it writes,
        so a second writer has to be kept out by other means.
        """
        if self.protocol not in ("s3", "s3a"):
            found = self.info()
            if found is None or found.etag != etag:
                return False
            self.put(data)
            return True
        try:
            # A chunk as large as the data makes it one request: parts of an upload cannot carry the condition.
            with_retries(lambda: self.fs.pipe_file(self.path, data, chunksize=len(data), IfMatch=f'"{etag}"'))
        except Exception as error:
            if _http_status(error) not in (404, 409, 412):
                raise
            return self._holds(data)  # it may, where the answer to a first attempt was lost
        return True

    def delete(self) -> None:
        """Remove the object; it is no error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            with_retries(lambda: self.fs.rm_file(self.path))

    def _holds(self, data: bytes) -> bool:
        try:
            return self.read() == data
        except FileNotFoundError:
            return False


def with_retries(call: Callable[[], T]) -> T:
    """Call until it succeeds, pausing longer each time, on anything but a plain "no such" or "not allowed"."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            if attempt == MAX_ATTEMPTS or not _is_transient(error):
                raise
            pause = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
            time.sleep(pause * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _is_transient(error: BaseException) -> bool:
    """Whether a retry can help: a network fault, or an answer other than a plain refusal (a 4xx but throttling)."""
    if _http_status(error) in (400, 401, 403, 404, 405, 409, 411, 412, 416) or "Credential" in type(error).__name__:
        return False
    # The network libraries' own errors are not OSErrors; they come from below fsspec and keep their module's name.
    from_network = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
    return from_network or isinstance(error, (OSError, TimeoutError))


def _http_status(error: BaseException) -> int:
    """Return the status of the S3 answer behind an error, 0 if there is none."""
    response = getattr(error.__cause__ or error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def read_failure(error: BaseException, uri: str) -> RowFailure:
    """Return the row error for an exception of `Location.read`."""
    code = "read_failed"
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        code = "not_found"
    elif isinstance(error, PermissionError):
        code = "forbidden"
    attempts = MAX_ATTEMPTS if code == "read_failed" else 1
    return RowFailure(RowError(code, "read", f"{uri}: {type(error).__name__}: {error}"[:500], attempts))


def _etag(info: dict[str, Any]) -> str | None:
    found = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if found:
        return str(found).strip('"')
    stamp = info.get("mtime") or info.get("created")
    return None if stamp is None else f"{stamp}-{info.get('size')}"


def _list_s3(location: Location) -> Iterator[ObjectInfo]:
    bucket, prefix, _ = location.fs.split_path(location.path)
    scheme = f"{location.protocol}://"
    # A key named exactly like the prefix is the object itself; otherwise the prefix ends at a path border.
    if prefix and not prefix.endswith("/"):
        own = location.info()
        if own is not None:
            yield own
        prefix += "/"
    token: dict[str, str] = {}
    while True:
        page = with_retries(
            lambda: location.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)  # noqa: B023
        )
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                yield ObjectInfo(f"{scheme}{bucket}/{item['Key']}", item["Size"], _etag(item))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _list_tree(location: Location) -> Iterator[ObjectInfo]:
    own = location.info()
    if own is not None:
        yield own
        return
    scheme = "" if "://" not in location.uri else f"{location.protocol}://"
    walk = _walk_local if isinstance(location.fs, LocalFileSystem) else _walk
    for item in walk(location.fs, location.path):
        name = str(item["name"])
        yield ObjectInfo(name if scheme == "file://" and "://" in name else scheme + name, item["size"], _etag(item))


def _walk(fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    for _, directories, files in fs.walk(folder, detail=True):
        directories_in_order = dict(sorted(directories.items()))
        directories.clear()
        directories.update(directories_in_order)  # walk descends in the order of this dict
        yield from (item for _, item in sorted(files.items()))


def _walk_local(fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    """The same, holding no more than names: a folder may have millions. Links to folders are not followed."""
    if not Path(folder).is_dir():
        return
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    folders = []
    for path in (f"{folder.rstrip('/')}/{name}" for name in names):
        try:
            found = fs.info(path)
        except FileNotFoundError:
            if Path(path).is_symlink():  # an input that cannot be read; others are gone, as temporary files go
                yield {"name": path, "size": 0}
            continue
        if found["type"] == "directory" and not found["islink"]:
            folders.append(path)
        else:
            yield found
    for each in folders:
        yield from _walk_local(fs, each)


@contextlib.contextmanager
def _local_temporary(target: Path, data: bytes) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link_local(target: Path, data: bytes) -> bool:
    """A hard link is the file system's put-if-absent: it appears whole, and only where nothing was."""
    if target.exists():
        return False
    with _local_temporary(target, data) as temporary:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
    return True
