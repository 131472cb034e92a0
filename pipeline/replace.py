"""Error rows give way to new ones, and no reader ever sees an image twice or not at all.

New rows wait in `_retry/data/`, where readers do not look. Then every file of `data/` that holds rows they replace is
written again as a whole, under its own name: it holds the same row numbers, so the name still says what is in it. That
is one atomic put for each file, done only if the file is still the version that was read. Whatever kills the driver
between two steps, `data/` is whole, and what waits is brought in by the next retry.

Only error rows are ever replaced. So what a forgotten worker leaves in `_retry` can do no harm: at worst an error gives
way to another account of the same error.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import ranges
from pipeline.commit import (
    Commit,
    committed_rows,
    data_directory,
    in_order,
    read_columns,
    read_commits,
    row_numbers,
    to_parquet,
)
from pipeline.errors import PipelineError
from pipeline.finish import withdraw_success
from pipeline.lease import Fence
from pipeline.manifest import Manifest
from pipeline.ranges import Ranges
from pipeline.storage import Location

_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class ErrorRows:
    """The error rows of an output: those to try again, and how many there are of any kind.

    `hopeless` are of the wanted codes too, but were found when the source was listed, which is not done again.
    """

    pending: Ranges
    hopeless: int
    total: int


def waiting(destination: Location) -> Location:
    """Return the place whose `data/` holds rows that wait to be brought in."""
    return destination.child("_retry")


def find_errors(destination: Location, manifest: Manifest, codes: frozenset[str] | None) -> ErrorRows:
    """Return the error rows of these codes, or of all; reads four columns of every file."""
    commits = read_commits(destination, manifest.rows_per_shard)
    pending: list[npt.NDArray[np.int64]] = []
    hopeless = total = 0
    for table in read_columns(destination, commits, ("shard_id", "row", "status", "error")):
        table = table.filter(pc.equal(table["status"], "error"))
        total += table.num_rows
        if codes is not None:
            table = table.filter(pc.is_in(pc.struct_field(table["error"], "code"), pa.array(codes, pa.string())))
        is_listed = pc.equal(pc.struct_field(table["error"], "stage"), "list")
        pending.append(row_numbers(table.filter(pc.invert(is_listed)), manifest.rows_per_shard))
        hopeless += pc.sum(is_listed).as_py() or 0
    return ErrorRows(ranges.of_rows(np.concatenate([np.empty(0, np.int64), *pending])), hopeless, total)


def replace_errors(destination: Location, manifest: Manifest, fence: Fence) -> int:
    """Bring all waiting rows into `data/` and return their number.

    `_SUCCESS.json`, whose digests will no longer hold, goes before the first change. Raises LeaseLost or PipelineError
    if another driver is at it.
    """
    staged = read_commits(waiting(destination), manifest.rows_per_shard)
    if not staged:
        return 0
    withdraw_success(destination)
    commits = read_commits(destination, manifest.rows_per_shard)
    bounds = np.array([(commit.rows[0, 0], commit.rows[-1, 1]) for commit in staged])

    def bring_in(commit: Commit) -> None:
        near = np.flatnonzero((bounds[:, 0] < commit.rows[-1, 1]) & (bounds[:, 1] > commit.rows[0, 0]))
        if len(near):
            _rewrite(destination, commit, [staged[index] for index in near], manifest.rows_per_shard, fence)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(bring_in, commits))
    fence.check()
    for commit in staged:
        data_directory(waiting(destination)).child(commit.name).delete()
    return ranges.count(committed_rows(staged))


def merged(old: pa.Table, new: pa.Table, rows_per_shard: int) -> pa.Table:
    """Return `old` with its error rows replaced by those that `new` has of them; same row numbers, schema, metadata."""
    errors = row_numbers(old.filter(pc.equal(old["status"], "error")), rows_per_shard)
    numbers, first = np.unique(row_numbers(new, rows_per_shard), return_index=True)
    new = new.take(pa.array(first[np.isin(numbers, errors)]))
    keep = ~np.isin(row_numbers(old, rows_per_shard), row_numbers(new, rows_per_shard))
    parts = [
        old.filter(pa.array(keep)),
        new.cast(old.schema.remove_metadata()).replace_schema_metadata(old.schema.metadata),
    ]
    table = in_order(pa.concat_tables(parts), rows_per_shard)
    assert np.array_equal(row_numbers(table, rows_per_shard), np.sort(row_numbers(old, rows_per_shard)))
    return table


def _rewrite(
    destination: Location, commit: Commit, staged: Sequence[Commit], rows_per_shard: int, fence: Fence
) -> None:
    location = data_directory(destination).child(commit.name)
    info = location.info()
    old = _table(location)
    new = pa.concat_tables(_table(data_directory(waiting(destination)).child(each.name)) for each in staged)
    table = merged(old, new.replace_schema_metadata(None), rows_per_shard)
    if table.equals(old):
        return
    fence.check()
    if info is None or info.etag is None or not location.replace(to_parquet(table), info.etag):
        raise PipelineError(f"{location.uri} was changed by somebody else meanwhile; see who writes there, then retry")


def _table(location: Location) -> pa.Table:
    return pq.read_table(pa.BufferReader(location.read()))
