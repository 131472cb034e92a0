"""`smolvlm evaluate`: labelled documents → readings → evaluation.json, evaluation.html, predictions.jsonl."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress

from jobs.evaluation_page import page, worst
from jobs.evaluation_report import report
from jobs.generated import Drawn, draw
from jobs.readings import Documents, Evaluation, OnProgress, Settings, read_documents
from jobs.run import fetch_checkpoint
from pipeline.errors import ConfigError
from pipeline.job import Model, Source
from pipeline.labelled import LabelColumns, LabelledSource
from pipeline.storage import Location

DEFAULT_DOCUMENTS, DEFAULT_SEED = 500, 7
_LINE_PERIOD_S = 5.0


@dataclass(frozen=True)
class Data:
    """What is read: a labelled source, or built-in documents whose fonts and texts no training saw."""

    source: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    kind_column: str | None = None
    degraded_column: str | None = None
    endpoint_url: str | None = None
    documents: int | None = None
    seed: int | None = None
    limit: int | None = None


def evaluate(data: Data, settings: Settings, output: Location, stream: TextIO) -> dict[str, Any]:
    """Read the documents, write the report below `output`, and return the content of `evaluation.json`.

    Progress goes to `stream`. Raises ConfigError for what a user can cause.
    """
    fetch_checkpoint(Model(settings.model, settings.revision))
    documents, described = _labelled(data) if data.source else _built_in(data, stream)
    count = len(documents) if data.limit is None else min(data.limit, len(documents))
    with _shown(stream, "reading", count) as on_progress:
        evaluation = read_documents(documents, count, settings, on_progress)
    content = report(evaluation, settings, described)
    _write(output, content, page(content, worst(evaluation.readings), documents), evaluation)
    return content


def _labelled(data: Data) -> tuple[Documents, dict[str, Any]]:
    _refuse({"documents": data.documents, "seed": data.seed}, "draws built-in documents; leave it or --source out")
    columns = LabelColumns(data.text_column or "text", data.kind_column, data.degraded_column)
    source = Source(str(data.source), column=data.image_column, endpoint_url=data.endpoint_url)
    named = {**_columns(data), "text_column": columns.text, "limit": data.limit}
    return LabelledSource(source, columns), {"uri": data.source, **named}


def _built_in(data: Data, stream: TextIO) -> tuple[Documents, dict[str, Any]]:
    """Draw the documents first, so that drawing is in no figure."""
    _refuse(_columns(data), "belongs to a labelled source: name it with --source, or leave the option out")
    count = min(data.documents or DEFAULT_DOCUMENTS, data.limit or sys.maxsize)
    seed = DEFAULT_SEED if data.seed is None else data.seed
    images = []
    with _shown(stream, "drawing", count) as on_progress:
        for image in draw("held_out", seed, count):
            images.append(image)
            on_progress(len(images), 0)
    return Drawn(images), {"built_in": "held_out", "count": count, "seed": seed}


def _columns(data: Data) -> dict[str, Any]:
    return {name: value for name, value in asdict(data).items() if name.endswith("_column")}


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value} {reason}")


def _write(output: Location, content: Mapping[str, Any], html: str, evaluation: Evaluation) -> None:
    lines = "".join(json.dumps(asdict(reading), ensure_ascii=False) + "\n" for reading in evaluation.readings)
    output.child("predictions.jsonl").put(lines.encode())
    output.child("evaluation.html").put(html.encode())
    output.child("evaluation.json").put(json.dumps(content, indent=1, ensure_ascii=False).encode())


@contextmanager
def _shown(stream: TextIO, phase: str, total: int) -> Iterator[OnProgress]:
    """Show a bar if `stream` is a terminal, else an object a line every few seconds."""
    if not stream.isatty():
        yield _line_writer(stream, phase, total)
        return
    with Progress(console=Console(file=stream)) as bar:
        task = bar.add_task(phase, total=total)
        yield lambda done, errors: bar.update(task, completed=done, description=f"{phase}, {errors} errors")


def _line_writer(stream: TextIO, phase: str, total: int) -> OnProgress:
    last = time.monotonic()

    def write(done: int, errors: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _LINE_PERIOD_S:
            last = time.monotonic()
            content = {"event": "progress", "phase": phase, "total": total, "done": done, "error": errors}
            print(json.dumps(content), file=stream, flush=True)

    return write
