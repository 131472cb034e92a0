"""The pending manifest rows as a Ray Data source: few read tasks, each streaming its stretch of the manifest."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline import ranges
from pipeline.manifest import Manifest, read_rows
from pipeline.ranges import Ranges
from pipeline.records import MANIFEST_SCHEMA
from pipeline.storage import Location

ROWS_PER_TASK = 65_536  # bounds the tasks the driver holds (1,600 for 10⁸ rows) and what each brings to memory
_BYTES_PER_ROW = 200


class ManifestSource(Datasource):
    """Rows of the manifest that no commit holds yet."""

    def __init__(self, destination: Location, manifest: Manifest, pending: Ranges) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._destination = destination
        self._manifest = manifest
        self._pending = pending

    def estimate_inmemory_data_size(self) -> int:
        """Return a rough size: manifest rows are small."""
        return ranges.count(self._pending) * _BYTES_PER_ROW

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return tasks of ROWS_PER_TASK rows, or fewer where that would leave less than `parallelism` tasks."""
        total = ranges.count(self._pending)
        rows = max(1, min(ROWS_PER_TASK, -(-total // max(parallelism, 1))))
        return [self._task(piece) for piece in ranges.split(self._pending, rows)]

    def _task(self, piece: Ranges) -> ReadTask:
        rows = ranges.count(piece)
        metadata = BlockMetadata(num_rows=rows, size_bytes=rows * _BYTES_PER_ROW, input_files=None, exec_stats=None)
        manifest = self._manifest.around(piece)
        return ReadTask(partial(_read, self._destination, manifest, piece), metadata, schema=MANIFEST_SCHEMA)


def _read(destination: Location, manifest: Manifest, piece: Ranges) -> Iterator[pa.Table]:
    yield from read_rows(destination, manifest, piece)
