"""The types that flow: output columns, manifest rows and errors as values."""

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, PipelineError, RowError, RowFailure
from pipeline.job import Task
from pipeline.records import (
    ANSWER_TYPE,
    ERROR_TYPE,
    FIXED_COLUMNS,
    MANIFEST_SCHEMA,
    ImageRef,
    error_value,
    image_refs,
    output_schema,
)


def test_the_output_has_one_struct_column_a_task_after_the_fixed_ones() -> None:
    schema = output_schema((Task("caption", "x"), Task("ocr", "y")))
    identity, image = ["uri", "member", "shard_id", "row", "etag"], ["sha256", "width", "height", "format", "num_tiles"]
    assert schema.names == [*identity, *image, "status", "error", "caption", "ocr"]
    assert schema.field("ocr").type == ANSWER_TYPE
    assert [field.name for field in ANSWER_TYPE] == [
        "text",
        "finish_reason",
        "prompt_tokens",
        "output_tokens",
        "mean_logprob",
    ]
    assert [field.name for field in ERROR_TYPE] == ["code", "stage", "message", "attempts"]
    assert frozenset(schema.names) - {"caption", "ocr"} == FIXED_COLUMNS
    assert {field.name for field in schema if not field.nullable} == {"uri", "shard_id", "row", "status"}


def test_manifest_rows_become_refs_and_back() -> None:
    refs = [
        ImageRef(0, 0, "s3://b/1.jpg", None, "object", 7, "tag", None),
        ImageRef(0, 1, "s3://b/a.tar", "1.jpg", "tar", 9, None, 512),
        ImageRef(1, 0, "s3://b/a.tar", "1.jpg", "tar", 9, None, 1536, "duplicate_key", "twice"),
    ]
    table = pa.Table.from_pylist([vars(ref) for ref in refs], schema=MANIFEST_SCHEMA)
    assert image_refs(table) == refs
    assert [ref.listed_error for ref in refs] == [None, None, RowError("duplicate_key", "list", "twice")]


@pytest.mark.parametrize("error", [None, RowError("truncated", "prepare", "x", 3)])
def test_errors_are_values_of_the_error_column(error: RowError | None) -> None:
    (value,) = pa.array([error_value(error)], ERROR_TYPE).to_pylist()
    assert (None if value is None else RowError(**value)) == error


def test_the_error_tree() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, PipelineError)
    assert str(RowFailure(RowError("x", "read", "what happened"))) == "what happened"
