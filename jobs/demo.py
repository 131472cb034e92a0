"""`smolvlm demo`: the main job with real parts on one machine: S3 server, Ray, bundled model, Parquet. No model hub."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.demo_images import DemoImage, demo_images
from jobs.progress import display, summary_text
from jobs.report import write_report
from jobs.run import execute
from jobs.s3_server import s3_server
from jobs.shortcuts import OCR
from jobs.spec import parse
from jobs.verify import verify
from pipeline.errors import ConfigError
from pipeline.storage import Location
from smolvlm.hub import BUNDLED

_NAME, _BUCKET = "demo", "demo"


def run_demo(output: Path) -> None:
    """Draw images, store them in an S3 server, read their text, verify, print it, and show it beside the pictures.

    Raises ConfigError if `output` holds something other than an earlier demo.
    """
    _clear(output)
    images = demo_images()
    with s3_server() as server, _environment(server.environment()):
        source = _upload(images, server.endpoint_url)
        print(f"{len(images)} images at {source} (SeaweedFS, {server.endpoint_url}); one of them is broken on purpose")
        job = parse(_job_content(source, server.endpoint_url, output), origin="demo").to_job()
        with display(sys.stdout) as shown:
            summary = execute(job, shown)
        print(f"{summary_text(summary)}\n\n{verify(str(output)).to_text()}\n")
        _print_rows(output, images)
        page = write_report(str(output))
    print(f"\nThe pictures with what was read: {page}")
    print(f"The rows are in {output.absolute()}/data. Read them with DuckDB:\n  {_duckdb_line(output)}")


def _job_content(source: str, endpoint_url: str, output: Path) -> dict[str, Any]:
    return {
        "name": _NAME,
        "source": {"uri": source, "endpoint_url": endpoint_url},
        "output": {"uri": str(output)},
        "model": {"id": BUNDLED, "dtype": "float32"},
        "tasks": [OCR],
    }


def _upload(images: Mapping[str, DemoImage], endpoint_url: str) -> str:
    folder = Location(f"s3://{_BUCKET}/images", endpoint_url)
    folder.fs.mkdir(_BUCKET)
    for name, image in images.items():
        folder.child(name).put(image.data)
    return folder.uri


def _clear(output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        return
    try:
        is_demo = json.loads((output / "_job.json").read_text())["name"] == _NAME
    except (OSError, ValueError, KeyError):
        is_demo = False
    if not is_demo:
        raise ConfigError(f"--output {output}: holds something other than an earlier demo; choose another folder")
    shutil.rmtree(output)


def _print_rows(output: Path, images: Mapping[str, DemoImage]) -> None:
    """What was read, line by line, and beside it what the picture says where that differs."""
    table = pq.read_table(output / "data", columns=["uri", "status", "error", OCR["name"]])
    for row in table.sort_by("uri").to_pylist():
        name = row["uri"].rpartition("/")[2]
        if row["status"] == "error":
            print(f"{name}: {row['error']['code']}, {row['error']['message']}")
        else:
            print(f"{name}: {_judgement(row[OCR['name']]['text'], images[name].text)}")


def _judgement(read: str, written: str) -> str:
    lines = "".join(f"\n    {line}" for line in read.splitlines())
    if read == written:
        return f"read right{lines}"
    return f"{lines}\n  where it says{''.join(f'{chr(10)}    {line}' for line in written.splitlines())}"


def _duckdb_line(output: Path) -> str:
    query = f"SELECT uri, status, error.code, {OCR['name']}.text FROM '{output.absolute()}/data/*.parquet'"
    return f'{sys.executable} -c "import duckdb; duckdb.sql(\\"{query}\\").show()"'


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block; Ray's workers inherit them, and the job file stays free of secrets."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
