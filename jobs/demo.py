"""`smolvlm demo`: the main job on one machine with real parts: S3 server, Ray, engine, Parquet. No model hub."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs import demo_model
from jobs.demo_images import demo_images
from jobs.progress import display, summary_text
from jobs.run import execute
from jobs.s3_server import s3_server
from jobs.spec import parse
from jobs.verify import verify
from pipeline.errors import ConfigError
from pipeline.storage import Location

_NAME, _BUCKET = "demo", "demo"
_UNTRAINED = """\
The vision half of this demo's checkpoint is untrained (random weights), so the text below does NOT describe the
pictures: it shows that every stage runs, with a language model that gets noise to see. For text that means something,
give `smolvlm caption` or `smolvlm ocr` a real checkpoint with --model."""


def run_demo(output: Path) -> None:
    """Draw images, store them in an S3 server, run the job, verify it and print the first rows.

    Raises ConfigError if `output` holds something other than an earlier demo.
    """
    _clear(output)
    checkpoint = _checkpoint()
    with s3_server() as server, _environment(server.environment()):
        images = demo_images()
        source = _upload(images, server.endpoint_url)
        print(f"{len(images)} images at {source} (SeaweedFS, {server.endpoint_url}); one of them is broken on purpose")
        job = parse(_job_content(source, server.endpoint_url, output, checkpoint), origin="demo").to_job()
        with display(sys.stdout) as shown:
            summary = execute(job, shown)
    print(summary_text(summary))
    print(f"\n{verify(str(output)).to_text()}\n\n{_UNTRAINED}\n")
    _print_rows(output)
    print(f"\nThe result is in {output.absolute()}/data. Read it with DuckDB:\n  {_duckdb_line(output)}")


def _job_content(source: str, endpoint_url: str, output: Path, checkpoint: Path) -> dict[str, Any]:
    # No splitting: one tile an image keeps the demo near a minute on two cores.
    return {
        "name": _NAME,
        "source": {"uri": source, "endpoint_url": endpoint_url},
        "output": {"uri": str(output)},
        "model": {"id": str(checkpoint), "dtype": "float32"},
        "tasks": [
            {"name": "what", "prompt": "What is this?", "max_new_tokens": 20},
            {"name": "reading", "prompt": "What text is written here?", "max_new_tokens": 20},
        ],
        "image": {"splitting": False},
    }


def _upload(images: Mapping[str, bytes], endpoint_url: str) -> str:
    folder = Location(f"s3://{_BUCKET}/images", endpoint_url)
    folder.fs.mkdir(_BUCKET)
    for name, data in images.items():
        folder.child(name).put(data)
    return folder.uri


def checkpoint_directory() -> Path:
    """Return where the demo checkpoint is kept: the user's cache, one folder per way of making it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smolvlm-pipeline"
    recipe = hashlib.sha256(Path(demo_model.__file__).read_bytes()).hexdigest()[:12]
    return cache / f"demo-256m-{recipe}"


def _checkpoint() -> Path:
    target = checkpoint_directory()
    if not target.exists():
        print(f"building the demo checkpoint in {target}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            # Renamed when whole, so that an interrupted build is never taken for a checkpoint.
            demo_model.build_demo_checkpoint(Path(folder) / "new").rename(target)
    return target


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


def _print_rows(output: Path) -> None:
    table = pq.read_table(output / "data", columns=["uri", "status", "error", "what", "reading"])
    for row in table.sort_by("uri").slice(0, 6).to_pylist():
        print(f"  {row['uri'].rpartition('/')[2]:20} {row['status']:6} {_said(row)}")


def _said(row: Mapping[str, Any]) -> str:
    if row["status"] == "error":
        return f"{row['error']['code']}: {row['error']['message'][:70]}"
    return " | ".join(" ".join(row[task]["text"].split())[:60] for task in ("what", "reading"))


def _duckdb_line(output: Path) -> str:
    query = f"SELECT uri, status, error.code, what.text, reading.text FROM '{output.absolute()}/data/*.parquet'"
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
