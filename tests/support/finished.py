"""A finished output, made without Ray: manifest, claimed job, committed files, `_SUCCESS.json`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from pipeline.claim import claim, file_metadata
from pipeline.commit import read_commits, write_commit
from pipeline.finish import read_totals, write_success
from pipeline.job import Job, Model, Output, Source, Task
from pipeline.manifest import ROWS_PER_SHARD, write_manifest
from pipeline.records import MANIFEST_SCHEMA, output_schema
from pipeline.storage import Location

TASKS = (Task("caption", "Describe this image."), Task("ocr", "Transcribe all text."))
SCHEMA = output_schema(TASKS)


def make_job(destination: Location, source: str = "s3://bucket/photos", tasks: tuple[Task, ...] = TASKS) -> Job:
    """A job whose model is known by its revision, so that no checkpoint is needed."""
    return Job("photos", Source(source), Output(destination.uri), Model("owner/model", "a" * 40), tasks)


def manifest_table(uris: Iterable[str]) -> pa.Table:
    """The inputs as objects of unknown size."""
    rows = [{"shard_id": 0, "row": 0, "uri": uri, "kind": "object", "etag": f"e{n}"} for n, uri in enumerate(uris)]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def row(number: int, uri: str, code: str | None = None, **changes: Any) -> dict[str, Any]:
    """One output row: an answer of each task, or an error."""
    place = {"shard_id": number // ROWS_PER_SHARD, "row": number % ROWS_PER_SHARD, "uri": uri, "etag": f"e{number}"}
    if code is not None:
        error = {"code": code, "stage": "read", "message": f"{uri}: {code}", "attempts": 1}
        return {**place, "status": "error", "error": error, **changes}
    answer = {"finish_reason": "stop", "prompt_tokens": 90, "output_tokens": 9, "mean_logprob": -0.3}
    answers = {name: {"text": f"{name} of {number}", **answer} for name in ("caption", "ocr")}
    return {**place, "status": "ok", "width": 30, "height": 20, "num_tiles": 1, **answers, **changes}


def commit(destination: Location, rows: list[dict[str, Any]], **metadata: str) -> str:
    """Commit rows as a run does and return the file's name."""
    everything = {**file_metadata(make_job(destination)), **metadata}
    return write_commit(destination, pa.Table.from_pylist(rows, schema=SCHEMA), ROWS_PER_SHARD, everything).name


def finish(destination: Location, inputs: int) -> None:
    """Write `_SUCCESS.json`."""
    write_success(destination, read_totals(destination, read_commits(destination, ROWS_PER_SHARD)), inputs, 1.0)


def begin(destination: Location, uris: list[str], source: str = "s3://bucket/photos") -> None:
    """Claim the destination and write its manifest."""
    claim(destination, make_job(destination, source))
    write_manifest(destination, [manifest_table(uris)])


def write_output(destination: Location, inputs: int, rows_per_file: int, errors: Mapping[int, str] = {}) -> list[str]:
    """Make the whole of it and return the names of its files, in the order of their rows."""
    uris = [f"s3://bucket/photos/{n}.jpg" for n in range(inputs)]
    begin(destination, uris)
    rows = [row(n, uri, errors.get(n)) for n, uri in enumerate(uris)]
    names = [commit(destination, rows[start : start + rows_per_file]) for start in range(0, inputs, rows_per_file)]
    finish(destination, inputs)
    return names
