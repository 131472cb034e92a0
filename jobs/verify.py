"""Count the rows of a destination against its manifest: every input exactly once, every file readable to the end."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, load_manifest
from pipeline.storage import Location

_BATCH_ROWS = 8192
_COLUMNS = ("shard_id", "row", "status", "error")


@dataclass(frozen=True)
class Report:
    """What a destination holds. `duplicate` counts the rows beyond the one that each input owes."""

    inputs: int
    rows: int
    ok: int
    error: int
    missing: int
    duplicate: int
    unreadable: int
    errors_by_code: dict[str, int]
    unreadable_files: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every input has exactly one row, ok or error, in a file that reads to its end."""
        exact = not (self.missing or self.duplicate or self.unreadable)
        return exact and self.rows == self.inputs == self.ok + self.error

    def to_json(self) -> dict[str, Any]:
        """Return the counts, without the file names."""
        return {key: value for key, value in asdict(self).items() if key != "unreadable_files"}

    def to_text(self) -> str:
        """Return the report for a person."""
        lines = [f"{name:11}{value:>12,}" for name, value in self.to_json().items() if isinstance(value, int)]
        lines += [f"  error {code}: {count:,}" for code, count in self.errors_by_code.items()]
        lines += [f"  unreadable: {name}" for name in self.unreadable_files]
        return "\n".join([*lines, "every input has exactly one row" if self.passed else "NOT complete"])


def verify(uri: str, endpoint_url: str | None = None) -> Report:
    """Read the manifest and every Parquet file below `uri`; a byte per input is held in memory.

    Raises ConfigError if there is no complete manifest, so that nothing says what the rows should be.
    """
    destination = Location(uri, endpoint_url)
    manifest = load_manifest(destination)
    if manifest is None:
        remedy = "check the address; if the job stopped while listing its source, run it again"
        raise ConfigError(f"{uri}: no complete manifest here, so no job output to verify; {remedy}")
    tally = _Tally(manifest)
    for file in _data_files(destination):
        tally.add_file(file)
    return tally.report()


@dataclass
class _FileRows:
    """What one file says: the global row numbers (-1 where it names no input), statuses and error codes."""

    index: list[npt.NDArray[np.int64]] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, batch: pa.RecordBatch, manifest: Manifest) -> None:
        shard, row = (_integers(batch.column(name)) for name in ("shard_id", "row"))
        index = shard * manifest.rows_per_shard + row
        inside = (shard >= 0) & (row >= 0) & (row < manifest.rows_per_shard) & (index < manifest.rows)
        self.index.append(np.where(inside, index, -1))
        self.statuses.update(value for value in batch.column("status").to_pylist() if value)
        failed = batch.filter(pc.fill_null(pc.equal(batch.column("status"), "error"), False))
        self.codes.update(code or "unknown" for code in pc.struct_field(failed.column("error"), "code").to_pylist())


class _Tally:
    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._seen: npt.NDArray[np.bool_] = np.zeros(manifest.rows, dtype=np.bool_)
        self._statuses: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._rows = 0
        self._unreadable: list[str] = []

    def add_file(self, file: Location) -> None:
        rows = _FileRows()
        try:
            for batch in _batches(file):
                rows.add(batch, self._manifest)
        except (OSError, pa.ArrowException, KeyError):
            # None of its rows count: a reader of the output cannot open it either.
            self._unreadable.append(file.uri)
            return
        for index in rows.index:
            self._rows += len(index)
            self._seen[index[index >= 0]] = True
        self._statuses.update(rows.statuses)
        self._codes.update(rows.codes)

    def report(self) -> Report:
        present = int(self._seen.sum())
        return Report(
            inputs=self._manifest.rows,
            rows=self._rows,
            ok=self._statuses["ok"],
            error=self._statuses["error"],
            missing=self._manifest.rows - present,
            duplicate=self._rows - present,
            unreadable=len(self._unreadable),
            errors_by_code=dict(sorted(self._codes.items())),
            unreadable_files=tuple(sorted(self._unreadable)),
        )


def _data_files(destination: Location) -> Iterator[Location]:
    directory = destination.child("data")
    for found in directory.list():
        name = found.uri.rpartition("/")[2]
        # A leading dot is a write under way on a local file system; readers skip it as well.
        if name.endswith(".parquet") and not name.startswith("."):
            yield directory.at(found.uri)


def _batches(file: Location) -> Iterator[pa.RecordBatch]:
    """Yield the whole file, every column, so that damage anywhere in it shows; memory is that of a row group."""
    with file.open() as handle:
        reader = pq.ParquetFile(handle, page_checksum_verification=True)
        missing = set(_COLUMNS) - set(reader.schema_arrow.names)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        yield from reader.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)


def _integers(column: pa.Array) -> npt.NDArray[np.int64]:
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
