"""The end of a run: every input has exactly one row, and `_SUCCESS.json` says so."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import ranges
from pipeline.commit import (
    Commit,
    committed_counts,
    committed_rows,
    data_directory,
    row_numbers,
    write_commit,
)
from pipeline.manifest import Manifest
from pipeline.ranges import Ranges
from pipeline.storage import Location

_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class FileTotals:
    """What one committed file adds to the totals."""

    name: str
    sha256: str
    rows: int
    counts: Counter[str]


def resolve_overlaps(destination: Location, commits: list[Commit], manifest: Manifest) -> list[Commit]:
    """Make commits disjoint: of rows that two files hold, the file first by name keeps them.

    Only a second driver that outlived its lease can have made any. The smaller file is written before the larger goes,
    so no row is missing at any moment.
    """
    if ranges.count(committed_rows(commits)) == sum(ranges.count(commit.rows) for commit in commits):
        return commits
    kept: list[Commit] = []
    held = ranges.empty()
    for commit in commits:
        if any(commit.name == other.name for other in kept):
            continue  # a replacement that an interrupted attempt had written before
        if ranges.count(ranges.intersection(commit.rows, held)):
            commit_or_none = _without(destination, commit, held, manifest)
            if commit_or_none is None:
                continue
            commit = commit_or_none
        kept.append(commit)
        held = ranges.union(held, commit.rows)
    return kept


def read_totals(destination: Location, commits: Iterable[Commit]) -> list[FileTotals]:
    """Read every committed file once and return what each holds."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(lambda commit: _totals(destination, commit), commits))


def total_counts(files: Iterable[FileTotals]) -> Counter[str]:
    """Return the counts of all files together."""
    return sum((file.counts for file in files), Counter())


def write_success(destination: Location, files: list[FileTotals], inputs: int, elapsed_s: float) -> None:
    """Store totals and digests in `_SUCCESS.json`."""
    counts = total_counts(files)
    content = {
        "inputs": inputs,
        "rows": sum(file.rows for file in files),
        "ok": counts["ok"],
        "error": counts["error"],
        "errors_by_code": errors_by_code(counts),
        "files": {file.name: {"rows": file.rows, "sha256": file.sha256} for file in files},
        "elapsed_s": round(elapsed_s, 3),
    }
    _success(destination).put(json.dumps(content, indent=1).encode())


def read_success(destination: Location) -> dict[str, Any] | None:
    """Return what `_SUCCESS.json` says, None while there is none."""
    try:
        content: dict[str, Any] = json.loads(_success(destination).read())
    except FileNotFoundError:
        return None
    return content


def withdraw_success(destination: Location) -> None:
    """Remove `_SUCCESS.json`: the files are about to change."""
    _success(destination).delete()


def _success(destination: Location) -> Location:
    return destination.child("_SUCCESS.json")


def errors_by_code(counts: Counter[str]) -> dict[str, int]:
    """Return the `error.<code>` counts by code, the most frequent first."""
    return {key.removeprefix("error."): n for key, n in counts.most_common() if key.startswith("error.") and n}


def _without(destination: Location, commit: Commit, held: Ranges, manifest: Manifest) -> Commit | None:
    location = data_directory(destination).child(commit.name)
    table = pq.read_table(pa.BufferReader(location.read()))
    keep = [not _contains(held, number) for number in row_numbers(table, manifest.rows_per_shard).tolist()]
    rest = table.filter(pa.array(keep))
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    replacement = write_commit(destination, rest, manifest.rows_per_shard, metadata) if rest.num_rows else None
    location.delete()
    return replacement


def _contains(rows: Ranges, number: int) -> bool:
    index = int(rows[:, 0].searchsorted(number, side="right")) - 1
    return index >= 0 and number < int(rows[index, 1])


def _totals(destination: Location, commit: Commit) -> FileTotals:
    data = data_directory(destination).child(commit.name).read()
    table = pq.read_table(io.BytesIO(data), columns=["status", "error"])
    return FileTotals(commit.name, hashlib.sha256(data).hexdigest(), table.num_rows, committed_counts(table))
