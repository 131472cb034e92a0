"""`smolvlm evaluate`: labelled documents → readings → evaluation.json, evaluation.html, predictions.jsonl."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import Progress

from jobs.evaluation_page import page, worst
from jobs.evaluation_report import report
from jobs.generated import GeneratedDocuments
from jobs.readings import Documents, Evaluation, OnProgress, Settings, read_documents
from pipeline.errors import ConfigError
from pipeline.job import Source
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
    documents, described = open_documents(data)
    count = len(documents) if data.limit is None else min(data.limit, len(documents))
    with _shown(stream, count) as on_progress:
        evaluation = read_documents(documents, count, settings, on_progress)
    content = report(evaluation, settings, described)
    _write(output, content, page(content, worst(evaluation.readings), documents), evaluation)
    return content


def open_documents(data: Data) -> tuple[Documents, dict[str, Any]]:
    """Return the documents and how the report names them. Raises ConfigError for options that contradict each other."""
    of_source = {name: value for name, value in asdict(data).items() if name.endswith("_column")}
    if data.source is None:
        _refuse(of_source, "belongs to a labelled source: name it with --source, or leave the option out")
        count = DEFAULT_DOCUMENTS if data.documents is None else data.documents
        seed = DEFAULT_SEED if data.seed is None else data.seed
        return GeneratedDocuments("held_out", seed, count), {"built_in": "held_out", "count": count, "seed": seed}
    _refuse({"documents": data.documents, "seed": data.seed}, "draws built-in documents; leave it or --source out")
    columns = LabelColumns(data.text_column or "text", data.kind_column, data.degraded_column)
    labelled = LabelledSource(Source(data.source, column=data.image_column, endpoint_url=data.endpoint_url), columns)
    return labelled, {"uri": data.source, **of_source, "text_column": columns.text, "limit": data.limit}


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
def _shown(stream: TextIO, total: int) -> Iterator[OnProgress]:
    """Show a bar if `stream` is a terminal, else an object a line every few seconds."""
    if not stream.isatty():
        yield _line_writer(stream, total)
        return
    with Progress(console=Console(file=stream)) as bar:
        task = bar.add_task("documents", total=total)
        yield lambda done, errors: bar.update(task, completed=done, description=f"documents, {errors} errors")


def _line_writer(stream: TextIO, total: int) -> OnProgress:
    last = time.monotonic()

    def write(done: int, errors: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _LINE_PERIOD_S:
            last = time.monotonic()
            content = {"event": "progress", "total": total, "done": done, "error": errors}
            print(json.dumps(content), file=stream, flush=True)

    return write
