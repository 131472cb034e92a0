"""The Parquet file is the commit: its footer says which rows it holds, and its name is the digest of those rows.

A retried write has the same rows, so the same name, so it changes nothing. There is no second marker to get out of
step.
"""

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import ranges
from pipeline.errors import PipelineError
from pipeline.ranges import Ranges
from pipeline.storage import Location, with_retries

ROWS_KEY = b"smolvlm.rows"
TIME_KEY = b"smolvlm.committed_at"
_READS_AT_ONCE = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Commit:
    """One file of `data/`, the manifest rows it holds, and when they came (seconds since 1970)."""

    name: str
    rows: Ranges
    committed_at: float


def data_directory(destination: Location) -> Location:
    """Return where the committed files are."""
    return destination.child("data")


def row_numbers(table: pa.Table, rows_per_shard: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return each row's number in the manifest, int64 [rows]."""
    shard = table["shard_id"].to_numpy().astype(np.int64)
    numbers: np.ndarray[tuple[int], np.dtype[np.int64]] = shard * rows_per_shard + table["row"].to_numpy()
    return numbers


def write_commit(destination: Location, table: pa.Table, rows_per_shard: int, metadata: Mapping[str, str]) -> Commit:
    """Store `table` as one file of `data/`, sorted by row number; a no-op if it is there already.

    Raises PipelineError if the table holds one row twice.
    """
    table = in_order(table, rows_per_shard)
    rows = ranges.of_rows(row_numbers(table, rows_per_shard))
    if ranges.count(rows) != table.num_rows:
        raise PipelineError(f"a commit of {table.num_rows} rows holds only {ranges.count(rows)} different ones")
    footer = json.dumps(_by_shard(rows, rows_per_shard), separators=(",", ":")).encode()
    name = file_name(footer)
    given = {key.encode(): value.encode() for key, value in metadata.items()}
    pairs = {TIME_KEY: f"{time.time():.3f}".encode(), **given, ROWS_KEY: footer}
    data_directory(destination).child(name).put_if_absent(to_parquet(table.replace_schema_metadata(pairs)))
    return Commit(name, rows, float(pairs[TIME_KEY]))


def file_name(footer: bytes) -> str:
    """Return the name of the file whose footer has this at ROWS_KEY."""
    return hashlib.sha256(footer).hexdigest()[:32] + ".parquet"


def in_order(table: pa.Table, rows_per_shard: int) -> pa.Table:
    """Return the table sorted by row number."""
    return table.take(pa.array(np.argsort(row_numbers(table, rows_per_shard), kind="stable")))


def read_commits(destination: Location, rows_per_shard: int) -> list[Commit]:
    """Return what `data/` holds, from the footers alone, sorted by name.

    Raises PipelineError naming a file whose footer cannot be read.
    """
    files = [info for info in data_directory(destination).list() if info.uri.endswith(".parquet")]
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        commits = pool.map(lambda info: _read_commit(destination.at(info.uri), rows_per_shard), files)
        return sorted(commits, key=lambda commit: commit.name)


def committed_rows(commits: Iterable[Commit]) -> Ranges:
    """Return all rows that are in some file."""
    return ranges.union(*[commit.rows for commit in commits])


def read_columns(destination: Location, commits: Iterable[Commit], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield these columns of each file, in the order of `commits`. Raises PipelineError naming an unreadable file."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        yield from pool.map(
            lambda commit: _read_columns(data_directory(destination).child(commit.name), columns), commits
        )


def committed_counts(table: pa.Table) -> Counter[str]:
    """Count rows by `ok` and `error`, and errors by `error.<code>`."""
    statuses = table["status"].to_pylist()
    codes = [error["code"] for error in table["error"].to_pylist() if error is not None]
    return Counter(statuses) + Counter(f"error.{code}" for code in codes)


def footer_rows(metadata: Mapping[bytes, bytes] | None, rows_per_shard: int) -> Ranges:
    """Return the rows that a footer claims. Raises ValueError if it claims none."""
    if not metadata or ROWS_KEY not in metadata:
        raise ValueError("the footer does not say which rows the file holds")
    triples = np.array(json.loads(metadata[ROWS_KEY]), dtype=np.int64).reshape(-1, 3)
    return ranges.union(triples[:, 1:] + triples[:, :1] * rows_per_shard)


def _read_commit(location: Location, rows_per_shard: int) -> Commit:
    def read(file: Any) -> Commit:
        metadata = pq.read_metadata(file).metadata
        rows = footer_rows(metadata, rows_per_shard)
        return Commit(location.uri.rpartition("/")[2], rows, float(metadata[TIME_KEY]))

    return _read(location, read)


def _read_columns(location: Location, columns: Sequence[str]) -> pa.Table:
    # A task's column may be named in parts: `caption.finish_reason`.
    return _read(location, lambda file: pq.ParquetFile(file).read(columns=list(columns)))


def _read(location: Location, read: Callable[[Any], T]) -> T:
    """Read parts of a file; again if it is replaced between two of its requests."""

    def attempt() -> T:
        with location.open(block_size=1 << 16) as file:
            return read(file)

    try:
        return with_retries(attempt)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{location.uri} is not a readable commit ({error}). Remove it and run again.") from error


def _by_shard(rows: Ranges, rows_per_shard: int) -> list[tuple[int, int, int]]:
    """Return `rows` as (shard, first row, stop row) triples."""
    triples = []
    for start, stop in rows.tolist():
        while start < stop:
            shard = start // rows_per_shard
            end = min(stop, (shard + 1) * rows_per_shard)
            triples.append((shard, start - shard * rows_per_shard, end - shard * rows_per_shard))
            start = end
    return triples


def to_parquet(table: pa.Table) -> bytes:
    """Return the table as the bytes of a file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
