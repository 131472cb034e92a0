"""What a source holds: objects → manifest rows. Image objects, WebDataset tars, Parquet files and lists of URIs.

Each object is taken by its own kind, so one prefix or one list may mix them. Whatever cannot be opened becomes a row
with an error, never a gap.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from re import Pattern
from re import compile as compile_regex
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from pipeline.errors import ConfigError
from pipeline.job import Source
from pipeline.records import MANIFEST_SCHEMA
from pipeline.storage import Location, ObjectInfo, read_failure, with_retries
from pipeline.tar import NotATar, TarCut, TarMember, tar_members

Kind = Literal["object", "tar", "parquet"]

# Suffixes that claim to be images, readable or not: an unreadable one is a row with an error, not a silent gap.
IMAGE_SUFFIXES = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "tif",
        "tiff",
        "bmp",
        "dib",
        "heic",
        "heif",
        "avif",
        "jxl",
        "jp2",
        "j2k",
        "ico",
        "svg",
        "psd",
        "jpeg2000",
        "mpo",
    ]
)
LIST_SUFFIXES = frozenset({"csv", "jsonl", "ndjson"})
URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "path")
IMAGE_COLUMNS = ("image", "jpg", "png", "bytes", "image_bytes", "content")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_ROWS_PER_TABLE = 10_000
_OBJECTS_PER_BATCH = 10_000
_MANIFEST_COLUMNS = [name for name in MANIFEST_SCHEMA.names if name not in ("shard_id", "row")]
_TABLE_SCHEMA = pa.schema([MANIFEST_SCHEMA.field(name) for name in _MANIFEST_COLUMNS])


@dataclass(frozen=True)
class InputBatch:
    """Objects of one kind, to be turned into manifest rows by one call of `expand`."""

    kind: Kind
    objects: tuple[ObjectInfo, ...]


Expand = Callable[[InputBatch], list[pa.Table]]
ExpandAll = Callable[[Expand, Iterable[InputBatch]], Iterator[list[pa.Table]]]


def _expand_here(expand: Expand, batches: Iterable[InputBatch]) -> Iterator[list[pa.Table]]:
    return map(expand, batches)


def manifest_tables(source: Source, expand_all: ExpandAll = _expand_here) -> Iterator[pa.Table]:
    """Yield the source's inputs as manifest tables without shard and row numbers.

    `expand_all` maps `expand` over batches, in order; a cluster does so in parallel.
    Raises ConfigError when the source does not exist or names nothing readable.
    """
    location = Location(source.uri, source.endpoint_url)
    for tables in expand_all(lambda batch: expand(batch, source), input_batches(source, location)):
        yield from tables


def input_batches(source: Source, location: Location) -> Iterator[InputBatch]:
    """Yield the source's objects in batches: many image objects, or one archive, at a time."""
    waiting: list[ObjectInfo] = []
    for info in _objects(source, location):
        kind = kind_of(info.uri, source)
        if kind == "object":
            waiting.append(info)
        elif kind is not None:
            yield InputBatch(kind, (info,))
        if len(waiting) == _OBJECTS_PER_BATCH:
            yield InputBatch("object", tuple(waiting))
            waiting = []
    if waiting:
        yield InputBatch("object", tuple(waiting))


def kind_of(uri: str, source: Source) -> Kind | None:
    """Return how to take the object, or None if it holds no image by its name.

    An object without a suffix counts as an image: many buckets name them by hash.
    """
    name = PurePosixPath(urlsplit(uri).path if "://" in uri else uri).name.lower()
    suffix = name.rpartition(".")[2] if "." in name else ""
    found: Kind | None = None
    if suffix == "tar" or name.endswith(_COMPRESSED_TARS):
        found = "tar"
    elif suffix == "parquet":
        found = "parquet"
    elif suffix in IMAGE_SUFFIXES or not suffix or _names_inputs(source):
        found = "object"
    wanted: dict[str, Kind | None] = {"images": "object", "webdataset": "tar", "parquet": "parquet"}
    return found if wanted.get(source.format, found) == found else None


def expand(batch: InputBatch, source: Source) -> list[pa.Table]:
    """Return the manifest rows of one batch."""
    if batch.kind == "object":
        return [_table([_object_row(info) for info in batch.objects])]
    (info,) = batch.objects
    rows = _tar_rows if batch.kind == "tar" else _parquet_rows
    try:
        return _tables(rows(info, source))
    except Exception as error:  # the archive is one input that failed; its neighbours go on
        failure = read_failure(error, info.uri).error
        return [_table([_object_row(info, batch.kind, failure.code, failure.message)])]


def _objects(source: Source, location: Location) -> Iterator[ObjectInfo]:
    if _is_one_list(source):
        return read_list(location, source.column)
    base, pattern = _split_glob(location, source.glob)
    if source.format == "list":
        found = (info for info in _matching(base, pattern) if not info.uri.startswith("."))
        return (entry for info in found for entry in read_list(location.at(info.uri), source.column))
    return _matching(base, pattern)


def _names_inputs(source: Source) -> bool:
    """Whether lists name the inputs, so that each is one whatever it is called."""
    return source.format == "list" or _is_one_list(source)


def _is_one_list(source: Source) -> bool:
    suffix = source.uri.rpartition(".")[2].lower()
    named = suffix in LIST_SUFFIXES and source.format == "auto"
    return named or (source.format == "list" and suffix in {*LIST_SUFFIXES, "parquet"})


def _split_glob(location: Location, glob: str | None) -> tuple[Location, Pattern[str] | None]:
    """A glob stands in its own field or in the URI, from its first path component with a wildcard on."""
    uri = location.uri
    if glob is None and any(sign in uri for sign in "*?["):
        parts = uri.split("/")
        first = next(index for index, part in enumerate(parts) if any(sign in part for sign in "*?["))
        uri, glob = "/".join(parts[:first]), "/".join(parts[first:])
    return location.at(uri), compile_regex(glob_translate(glob)) if glob else None


def _matching(base: Location, pattern: Pattern[str] | None) -> Iterator[ObjectInfo]:
    root = base.path.rstrip("/") + "/"
    try:
        for info in base.list():
            relative = base.at(info.uri).path.removeprefix(root)
            is_named = relative == base.path  # the source is this one object
            if is_named or (pattern.match(relative) if pattern else not _is_hidden(relative)):
                yield info
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(
            f"source.uri {base.uri}: {error}. Check the address, the endpoint and the credentials."
        ) from error


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def read_list(location: Location, column: str | None) -> Iterator[ObjectInfo]:
    """Yield the URIs that a CSV, JSONL or Parquet file names; size and etag are not known.

    Raises ConfigError if the list cannot be read or has no URI column.
    """
    try:
        yield from _read_list_rows(location, column)
    except (OSError, pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"list {location.uri}: {type(error).__name__}: {error}") from error


def _read_list_rows(location: Location, column: str | None) -> Iterator[ObjectInfo]:
    suffix = location.uri.rpartition(".")[2].lower()
    with location.open() as file:
        if suffix == "parquet":
            parquet = pq.ParquetFile(file)
            name = _uri_column(parquet.schema_arrow.names, column, location)
            for batch in parquet.iter_batches(columns=[name]):
                yield from (ObjectInfo(_uri_of(row, name, location), None, None) for row in batch.to_pylist())
            return
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # spreadsheets put a byte order mark first
        rows: Iterator[dict[str, Any]] = csv.DictReader(lines) if suffix == "csv" else _json_rows(lines, location)
        name = ""
        for row in rows:
            name = name or _uri_column(row, column, location)
            yield ObjectInfo(_uri_of(row, name, location), None, None)


def _json_rows(lines: Iterable[str], location: Location) -> Iterator[dict[str, Any]]:
    for line in lines:
        row = json.loads(line) if line.strip() else {}
        if not isinstance(row, dict):
            raise ConfigError(
                f"list {location.uri}: a line is not an object: {line[:200]!r}. Write one as {{'uri': …}}."
            )
        if row:
            yield row


def _uri_of(row: dict[str, Any], name: str, location: Location) -> str:
    uri = row.get(name)
    if not uri:
        raise ConfigError(f"list {location.uri}: a row has no {name!r}: {str(row)[:200]}. Every row needs a URI.")
    return str(uri)


def _uri_column(names: Iterable[str], column: str | None, location: Location) -> str:
    names = list(names)
    found = column if column in names else next((name for name in URI_COLUMNS if name in names), None)
    if found is None or (column is not None and found != column):
        wanted = repr(column) if column else " or ".join(map(repr, URI_COLUMNS))
        raise ConfigError(f"list {location.uri}: no column {wanted} among {names}. Name it with source.column.")
    return found


def _object_row(
    info: ObjectInfo, kind: Kind = "object", code: str | None = None, message: str | None = None
) -> tuple[Any, ...]:
    return (info.uri, None, kind, info.size, info.etag, None, code, message)


def _tar_rows(info: ObjectInfo, source: Source) -> Iterator[tuple[Any, ...]]:
    """One row per image member, then one for the archive itself if it is cut."""
    if info.uri.lower().endswith(_COMPRESSED_TARS):
        yield _object_row(
            info, "tar", "unsupported_format", f"{info.uri}: compressed tars cannot be read in ranges; store plain .tar"
        )
        return
    location = Location(info.uri, source.endpoint_url)
    known = info if info.size is not None else with_retries(location.info)
    if known is None or known.size is None:
        raise FileNotFoundError(info.uri)
    seen: set[str] = set()
    try:
        with location.open() as file:
            for member in tar_members(file, known.size):
                if _is_image_name(member.name):
                    yield _member_row(known, member, member.name in seen)
                    seen.add(member.name)
    except TarCut as error:
        yield _object_row(known, "tar", "archive_truncated", f"{info.uri}: {error}")
    except NotATar as error:
        yield _object_row(known, "tar", "archive_invalid", f"{info.uri}: {error}")


def _is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith(".")


def _member_row(info: ObjectInfo, member: TarMember, duplicate: bool) -> tuple[Any, ...]:
    code = message = None
    if duplicate:
        code, message = "duplicate_key", f"{member.name} stands in {info.uri} more than once; the first one is read"
    elif not member.whole:
        code, message = "truncated", f"{info.uri} ends inside {member.name}"
    return (info.uri, member.name, "tar", member.size, info.etag, member.offset, code, message)


def _parquet_rows(info: ObjectInfo, source: Source) -> Iterator[tuple[Any, ...]]:
    with Location(info.uri, source.endpoint_url).open() as file:
        try:
            parquet = pq.ParquetFile(file)
            column = image_column(parquet.schema_arrow, source.column)
        except (pa.ArrowException, ConfigError) as error:
            yield _object_row(info, "parquet", "parquet_invalid", f"{info.uri}: {error}")
            return
        del column
        for index in range(parquet.metadata.num_rows):
            yield (info.uri, str(index), "parquet", None, info.etag, index, None, None)


def image_column(schema: pa.Schema, column: str | None) -> str:
    """Return the column that holds image bytes: binary, or a struct with a binary `bytes` field.

    Raises ConfigError naming the columns when there is none or when several could be meant.
    """
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if column is not None:
        candidates = [name for name in candidates if name == column]
    elif len(candidates) > 1:
        candidates = [name for name in candidates if name in IMAGE_COLUMNS] or candidates
    if len(candidates) != 1:
        wanted = f"image column {column!r}" if column else "single image column"
        raise ConfigError(
            f"no {wanted} (binary, or struct with `bytes`) among {schema.names}. Name it with source.column."
        )
    return str(candidates[0])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _tables(rows: Iterator[tuple[Any, ...]]) -> list[pa.Table]:
    tables, waiting = [], []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _ROWS_PER_TABLE:
            tables.append(_table(waiting))
            waiting = []
    return [*tables, _table(waiting)] if waiting else tables


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(_TABLE_SCHEMA)
    return pa.table(
        [pa.array(list(values), field.type) for values, field in zip(columns, _TABLE_SCHEMA, strict=True)],
        schema=_TABLE_SCHEMA,
    )
