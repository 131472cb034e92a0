"""One committed file: readable to its end, of this job, named after its rows, each row about the input it names."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import ranges
from pipeline.claim import FINGERPRINT_KEY
from pipeline.commit import ROWS_KEY, file_name, footer_rows
from pipeline.manifest import Manifest, Part, read_rows
from pipeline.records import FIXED_COLUMNS
from pipeline.storage import Location

_BATCH_ROWS = 8192
_NOWHERE = -1
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """Something that is not as a job leaves it: what kind, in which file, and what exactly."""

    kind: str
    file: str
    detail: str


@dataclass(frozen=True)
class CheckedFile:
    """What one file holds: row numbers of the manifest (-1 for rows of no input), and counts as in a run's totals."""

    name: str
    sha256: str
    numbers: Numbers
    counts: Counter[str]
    problems: tuple[Problem, ...]


class FileChecker:
    """Checks files of one output. Keeps the part of the manifest it read last, since files hold neighbouring rows."""

    def __init__(self, destination: Location, manifest: Manifest, schema: pa.Schema, fingerprint: str) -> None:
        self._destination = destination
        self._manifest = manifest
        self._schema = schema
        self._fingerprint = fingerprint
        self._kept: tuple[Part, pa.Table] | None = None

    def check(self, file: Location) -> CheckedFile:
        """Read every byte of it."""
        name = file.uri.rpartition("/")[2]
        sha256 = ""
        try:
            data = file.read()
            sha256 = hashlib.sha256(data).hexdigest()
            reader = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            if not reader.schema_arrow.equals(self._schema):
                return _nothing(name, sha256, "schema", f"its columns are {_columns(reader.schema_arrow)}")
            # Every column of every row, so that damage anywhere shows.
            batches = list(reader.iter_batches(batch_size=_BATCH_ROWS, use_threads=False))
        except (OSError, pa.ArrowException) as error:
            # None of its rows count: a reader of the output cannot open it either.
            return _nothing(name, sha256, "unreadable", str(error).splitlines()[0][:200])
        table = pa.Table.from_batches(batches, schema=self._schema)
        numbers = self._numbers(table)
        problems = [*self._origin(name, reader.metadata.metadata, numbers), *self._rows(name, table, numbers)]
        return CheckedFile(name, sha256, numbers, _counts(table), tuple(problems))

    def _numbers(self, table: pa.Table) -> Numbers:
        shard, row = (pc.fill_null(table[name].cast(pa.int64()), _NOWHERE).to_numpy() for name in ("shard_id", "row"))
        numbers = shard * self._manifest.rows_per_shard + row
        inside = (shard >= 0) & (row >= 0) & (row < self._manifest.rows_per_shard) & (numbers < self._manifest.rows)
        return np.where(inside, numbers, _NOWHERE)

    def _origin(self, name: str, metadata: dict[bytes, bytes] | None, numbers: Numbers) -> Iterator[Problem]:
        """The footer names the job and the rows, the name follows from the rows."""
        metadata = metadata or {}
        if metadata.get(FINGERPRINT_KEY.encode()) != self._fingerprint.encode():
            yield Problem("fingerprint", name, "its rows are of a job other than the one in _job.json")
        if name != file_name(metadata.get(ROWS_KEY, b"")):
            yield Problem("name", name, "it is not named after the rows that its footer claims")
        try:
            claimed = footer_rows(metadata, self._manifest.rows_per_shard)
        except ValueError as error:
            yield Problem("footer", name, str(error))
            return
        if not np.array_equal(claimed, ranges.of_rows(numbers)):
            yield Problem("footer", name, "it holds other rows than its footer claims")

    def _rows(self, name: str, table: pa.Table, numbers: Numbers) -> Iterator[Problem]:
        status = table["status"]
        is_ok, is_error = pc.equal(status, "ok"), pc.equal(status, "error")
        if odd := table.num_rows - _true(pc.or_(is_ok, is_error)):
            yield Problem("status", name, f"{odd:,} rows are neither ok nor error")
        has_code = pc.is_valid(pc.struct_field(table["error"], "code"))
        answered = [pc.is_valid(table[column]) for column in table.schema.names if column not in FIXED_COLUMNS]
        wrong = _true(pc.and_(is_ok, has_code)) + _true(pc.and_(is_error, pc.invert(has_code)))
        wrong += sum(_true(pc.and_(is_ok, pc.invert(column))) for column in answered)
        if wrong:
            yield Problem("status", name, f"{wrong:,} times an error without a code, or ok with an error or no answer")
        if misplaced := self._misplaced(table, numbers):
            yield Problem("input", name, f"{misplaced:,} rows name another input than their place in the manifest does")

    def _misplaced(self, table: pa.Table, numbers: Numbers) -> int:
        count = 0
        for part in self._manifest.parts:
            inside = (numbers >= part.start) & (numbers < part.start + part.rows)
            if inside.any():
                wanted = self._part(part).take(pa.array(numbers[inside] - part.start))
                found = table.filter(pa.array(inside))
                same = [_same(wanted[column], found[column]) for column in wanted.column_names]
                count += int((~np.logical_and.reduce(same)).sum())
        return count

    def _part(self, part: Part) -> pa.Table:
        if self._kept is None or self._kept[0] != part:
            rows = ranges.of_rows(np.arange(part.start, part.start + part.rows))
            table = pa.concat_tables(read_rows(self._destination, self._manifest, rows))
            self._kept = part, table.select(["uri", "member", "etag"]).combine_chunks()
        return self._kept[1]


def _nothing(name: str, sha256: str, kind: str, detail: str) -> CheckedFile:
    return CheckedFile(name, sha256, np.empty(0, np.int64), Counter(), (Problem(kind, name, detail),))


def _counts(table: pa.Table) -> Counter[str]:
    counts = Counter(value for value in table["status"].to_pylist() if value in ("ok", "error"))
    failed = table.filter(pc.equal(table["status"], "error"))
    codes = pc.struct_field(failed["error"], "code").to_pylist()
    return counts + Counter(f"error.{code or 'unknown'}" for code in codes)


def _true(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _same(a: pa.ChunkedArray, b: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Where two text columns say the same; nothing equals nothing."""
    both_null = np.asarray(pc.and_(pc.is_null(a), pc.is_null(b)))
    equal: npt.NDArray[np.bool_] = np.asarray(pc.fill_null(pc.equal(a, b), False)) | both_null
    return equal


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:200]
