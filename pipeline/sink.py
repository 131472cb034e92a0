"""Ray Data's last stage: rows → one Parquet file a write task, which is the commit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor

from pipeline.commit import committed_counts, write_commit
from pipeline.control import Control
from pipeline.lease import Fence
from pipeline.storage import Location


@dataclass(frozen=True)
class CommitSink(Datasink[None]):
    """Writes rows of `schema` below `destination`. Running twice with the same rows is harmless."""

    destination: Location
    schema: pa.Schema
    rows_per_shard: int
    rows_per_file: int
    metadata: Mapping[str, str]
    fence: Fence
    control: Control

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> None:
        """Commit all rows of `blocks` as one file, unless another driver has taken over."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table.select(self.schema.names).cast(self.schema) for table in tables if table.num_rows]
        if not tables:
            return
        table = pa.concat_tables(tables)
        self.fence.check()
        write_commit(self.destination, table, self.rows_per_shard, self.metadata)
        self.control.add("write", **committed_counts(table))

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray Data gathers before it calls `write`."""
        return self.rows_per_file
