"""The manifest: every input once, numbered, cut into shards, written once and never changed.

Parts are Parquet files; `_manifest/_complete.json` names those that count and is put only if absent, so a listing that
died half-way leaves nothing that anyone reads. Row numbers run through: `shard_id * rows_per_shard + row`.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ranges import Ranges
from pipeline.records import MANIFEST_SCHEMA
from pipeline.storage import Location

ROWS_PER_SHARD = 1024
_ROWS_PER_PART = 32_768  # what the driver holds at a time
_ROWS_PER_GROUP = 8_192


@dataclass(frozen=True)
class Part:
    """One Parquet file of the manifest: rows `[start, start + rows)`."""

    name: str
    start: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What `_complete.json` says."""

    rows: int
    rows_per_shard: int
    parts: tuple[Part, ...]

    @property
    def num_shards(self) -> int:
        """Number of shards, the last one perhaps smaller."""
        return -(-self.rows // self.rows_per_shard)

    def around(self, wanted: Ranges) -> "Manifest":
        """Return the manifest with only those parts that lie between the first and the last of the wanted rows."""
        start, stop = wanted[0, 0], wanted[-1, 1]
        parts = (part for part in self.parts if part.start < stop and part.start + part.rows > start)
        return replace(self, parts=tuple(parts))


def load_manifest(destination: Location) -> Manifest | None:
    """Return the destination's manifest, or None while there is no complete one."""
    try:
        content = json.loads(_directory(destination).child("_complete.json").read())
    except FileNotFoundError:
        return None
    return Manifest(content["rows"], content["rows_per_shard"], tuple(Part(**part) for part in content["parts"]))


def write_manifest(destination: Location, tables: Iterable[pa.Table], limit: int | None = None) -> Manifest:
    """Number the rows of `tables`, store them, and return the manifest that counts: this one or an earlier one."""
    directory, attempt = _directory(destination), uuid4().hex[:8]
    parts: list[Part] = []
    for table in _regroup(_limited(tables, limit), _ROWS_PER_PART):
        start = parts[-1].start + parts[-1].rows if parts else 0
        part = Part(f"part-{attempt}-{len(parts):06d}.parquet", start, table.num_rows)
        directory.child(part.name).put(_to_parquet(_numbered(table, start)))
        parts.append(part)
    manifest = Manifest(sum(part.rows for part in parts), ROWS_PER_SHARD, tuple(parts))
    directory.child("_complete.json").put_if_absent(json.dumps(asdict(manifest), indent=1).encode())
    stored = load_manifest(destination)
    assert stored is not None
    return stored


def read_rows(destination: Location, manifest: Manifest, wanted: Ranges) -> Iterator[pa.Table]:
    """Yield the manifest rows of `wanted`, in order, a row group at a time at most."""
    for part in manifest.parts:
        inside = wanted[(wanted[:, 0] < part.start + part.rows) & (wanted[:, 1] > part.start)]
        if len(inside):
            yield from _read_part(_directory(destination).child(part.name), part, inside)


def _read_part(location: Location, part: Part, wanted: Ranges) -> Iterator[pa.Table]:
    file = pq.ParquetFile(pa.BufferReader(location.read()))
    group_start = part.start
    for group in range(file.num_row_groups):
        group_stop = group_start + file.metadata.row_group(group).num_rows
        inside = wanted[(wanted[:, 0] < group_stop) & (wanted[:, 1] > group_start)]
        if len(inside):
            table = file.read_row_group(group)
            for start, stop in inside.tolist():
                first = max(start, group_start)
                yield table.slice(first - group_start, min(stop, group_stop) - first)
        group_start = group_stop


def _directory(destination: Location) -> Location:
    return destination.child("_manifest")


def _limited(tables: Iterable[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for table in tables:
        if left is None:
            yield table
            continue
        yield table.slice(0, left)
        left -= min(left, table.num_rows)
        if left == 0:
            return


def _regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows as tables of exactly `rows`, the last one smaller."""
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += table.num_rows
        while held >= rows:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, rows)
            held -= rows
            waiting = [whole.slice(rows)]
    if held:
        yield pa.concat_tables(waiting)


def _numbered(table: pa.Table, start: int) -> pa.Table:
    numbers = pa.array(np.arange(start, start + table.num_rows))
    shard = pc.divide(numbers, ROWS_PER_SHARD)
    row = pc.subtract(numbers, pc.multiply(shard, ROWS_PER_SHARD))
    columns = {"shard_id": shard.cast(pa.int32()), "row": row.cast(pa.int32())}
    return pa.table(
        [columns.get(f.name) if f.name in columns else table[f.name] for f in MANIFEST_SCHEMA],
        schema=MANIFEST_SCHEMA,
    )


def _to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return sink.getvalue()
