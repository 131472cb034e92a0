"""The types that flow between the stages and the schemas of the two Parquet layouts, manifest and output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.job import Task

Kind = Literal["object", "tar", "parquet"]
"""How an input is stored: an object of its own, a member of a tar, or a cell of a Parquet file."""

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("offset", pa.int64()),  # tar: first byte of the member; parquet: row index in the file
        pa.field("error_code", pa.string()),  # known when listed, e.g. a duplicate key in a tar
        pa.field("error_message", pa.string()),
    ]
)

ERROR_TYPE = pa.struct(
    [
        pa.field("code", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempts", pa.int32()),
    ]
)

ANSWER_TYPE = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("mean_logprob", pa.float32()),
    ]
)

_IDENTITY_FIELDS = [
    pa.field("uri", pa.string(), nullable=False),
    pa.field("member", pa.string()),
    pa.field("shard_id", pa.int32(), nullable=False),
    pa.field("row", pa.int32(), nullable=False),
    pa.field("etag", pa.string()),
]
_IMAGE_FIELDS = [
    pa.field("sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("num_tiles", pa.int32()),
]

PREPARED_SCHEMA = pa.schema(
    [
        *_IDENTITY_FIELDS,
        *_IMAGE_FIELDS,
        pa.field("error", ERROR_TYPE),
        pa.field("grid_rows", pa.int32()),
        pa.field("grid_cols", pa.int32()),
        pa.field("tiles", pa.large_binary()),  # uint8 [num_tiles, S, S, 3] as one run of bytes
    ]
)


def output_schema(tasks: Sequence[Task]) -> pa.Schema:
    """Return the schema of `data/*.parquet`: one row per image, one struct column per task."""
    status = [pa.field("status", pa.string(), nullable=False), pa.field("error", ERROR_TYPE)]
    answers = [pa.field(task.name, ANSWER_TYPE) for task in tasks]
    return pa.schema([*_IDENTITY_FIELDS, *_IMAGE_FIELDS, *status, *answers])


FIXED_COLUMNS = frozenset(output_schema(()).names)


@dataclass(frozen=True)
class ImageRef:
    """One manifest row: where one image is, and its place (`shard_id`, `row`) in the job."""

    shard_id: int
    row: int
    uri: str
    member: str | None
    kind: Kind
    size: int | None
    etag: str | None
    offset: int | None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def listed_error(self) -> RowError | None:
        """The error that listing already found, if any."""
        if self.error_code is None:
            return None
        return RowError(self.error_code, "list", self.error_message or self.error_code)


def image_refs(table: pa.Table) -> list[ImageRef]:
    """Return the rows of a manifest table."""
    return [ImageRef(**row) for row in table.select(MANIFEST_SCHEMA.names).to_pylist()]


def error_value(error: RowError | None) -> dict[str, Any] | None:
    """Return `error` as a value of the `error` column."""
    if error is None:
        return None
    return {"code": error.code, "stage": error.stage, "message": error.message, "attempts": error.attempts}
