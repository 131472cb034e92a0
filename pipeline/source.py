"""What a source holds: objects → manifest rows. Image objects, WebDataset tars, Parquet files and lists of URIs.

Each object is taken by its own kind, so one prefix or one list may mix them. Whatever cannot be opened becomes a row
with an error, never a gap.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from re import Pattern
from re import compile as compile_regex
from typing import Any

import pyarrow as pa
from fsspec.utils import glob_translate

from pipeline.archive import COMPRESSED_TARS, IMAGE_SUFFIXES, object_row, parquet_rows, tar_rows
from pipeline.errors import ConfigError
from pipeline.job import Source
from pipeline.records import MANIFEST_SCHEMA, Kind
from pipeline.storage import Location, ObjectInfo, read_failure
from pipeline.uri_list import read_list

LIST_SUFFIXES = frozenset({"csv", "jsonl", "ndjson"})
_ROWS_PER_TABLE = 10_000
_OBJECTS_PER_BATCH = 2_000
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
    path = uri.partition("?")[0].partition("#")[0] if "://" in uri else uri
    name = path.rstrip("/").rpartition("/")[2].lower()
    suffix = name.rpartition(".")[2] if "." in name else ""
    found: Kind | None = None
    if suffix == "tar" or name.endswith(COMPRESSED_TARS):
        found = "tar"
    elif suffix == "parquet":
        found = "parquet"
    elif suffix in IMAGE_SUFFIXES or not suffix or names_inputs(source):
        found = "object"
    wanted: dict[str, Kind | None] = {"images": "object", "webdataset": "tar", "parquet": "parquet"}
    return found if wanted.get(source.format, found) == found else None


def expand(batch: InputBatch, source: Source) -> list[pa.Table]:
    """Return the manifest rows of one batch."""
    if batch.kind == "object":
        return [_table([object_row(info) for info in batch.objects])]
    (info,) = batch.objects
    rows = tar_rows if batch.kind == "tar" else parquet_rows
    try:
        return _tables(rows(info, source))
    except Exception as error:  # the archive is one input that failed; its neighbours go on
        failure = read_failure(error, info.uri).error
        return [_table([object_row(info, batch.kind, failure.code, failure.message)])]


def names_inputs(source: Source) -> bool:
    """Whether lists name the inputs, so that each is one whatever it is called."""
    return source.format == "list" or _is_one_list(source)


def list_files(source: Source, location: Location) -> Iterator[Location]:
    """Yield the lists of a source for which `names_inputs` holds."""
    if _is_one_list(source):
        yield location
        return
    base, pattern = _split_glob(location, source.glob)
    yield from (location.at(info.uri) for info in _matching(base, pattern) if not info.uri.startswith("."))


def _objects(source: Source, location: Location) -> Iterator[ObjectInfo]:
    if names_inputs(source):
        return (info for file in list_files(source, location) for info in read_list(file, source.column))
    return _matching(*_split_glob(location, source.glob))


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
    # `base.at(info.uri).path`, a million times, would take longer than reading the store's answers.
    scheme = f"{base.protocol}://" if "://" in base.uri else ""
    root = f"{scheme}{base.path.rstrip('/')}/"
    try:
        for info in base.list():
            relative = info.uri.removeprefix(root)
            is_named = info.uri == base.uri  # the source is this one object
            if is_named or (pattern.match(relative) if pattern else not _is_hidden(relative)):
                yield info
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(
            f"source.uri {base.uri}: {error}. Check the address, the endpoint and the credentials."
        ) from error


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


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
