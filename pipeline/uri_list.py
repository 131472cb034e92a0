"""Lists that name the inputs: CSV, JSONL or Parquet with a column of URIs, read as a stream."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.storage import Location, ObjectInfo

URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "path")


def read_list(location: Location, column: str | None) -> Iterator[ObjectInfo]:
    """Yield the URIs that a CSV, JSONL or Parquet file names; size and etag are not known.

    A relative one is taken from the list's own folder. Raises ConfigError if the list cannot be read or has no URI
    column.
    """
    return (info for info, _ in read_labelled_list(location, column, ()))


def read_labelled_list(
    location: Location, column: str | None, labels: Sequence[str]
) -> Iterator[tuple[ObjectInfo, dict[str, Any]]]:
    """Yield the same with what each row holds in the columns `labels`. Raises ConfigError also if one is missing."""
    try:
        for row, name in _rows(location, column, labels):
            yield ObjectInfo(_uri_of(row, name, location), None, None), {label: row.get(label) for label in labels}
    except (OSError, pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"list {location.uri}: {type(error).__name__}: {error}") from error


def _rows(location: Location, column: str | None, labels: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row and the name of its URI column."""
    suffix = location.uri.rpartition(".")[2].lower()
    with location.open() as file:
        if suffix == "parquet":
            parquet = pq.ParquetFile(file)
            name = _uri_column(parquet.schema_arrow.names, column, labels, location)
            for batch in parquet.iter_batches(columns=list(dict.fromkeys([name, *labels]))):
                yield from ((row, name) for row in batch.to_pylist())
            return
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # spreadsheets put a byte order mark first
        rows: Iterator[dict[str, Any]] = csv.DictReader(lines) if suffix == "csv" else _json_rows(lines, location)
        name = ""
        for row in rows:
            name = name or _uri_column(row, column, labels, location)
            yield row, name


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
    is_relative = "://" not in str(uri) and not str(uri).startswith("/")
    return location.uri[: location.uri.rfind("/") + 1] + str(uri) if is_relative else str(uri)


def _uri_column(names: Iterable[str], column: str | None, labels: Iterable[str], location: Location) -> str:
    names = list(names)
    found = column if column in names else next((name for name in URI_COLUMNS if name in names), None)
    if found is None or (column is not None and found != column):
        wanted = repr(column) if column else " or ".join(map(repr, URI_COLUMNS))
        raise ConfigError(f"list {location.uri}: no column {wanted} among {names}. Name it with source.column.")
    for label in labels:
        if label not in names:
            raise ConfigError(f"list {location.uri}: no column {label!r} among {names}. Name the one that holds it.")
    return found
