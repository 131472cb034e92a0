"""`smolvlm …`: parse, call, print.

Exit codes: 0 done, 1 verify found something or the run broke, 2 wrong use, 3 too many error rows, 130 interrupted.

Output: with --json, stdout holds exactly one JSON object and progress goes to stderr. Without it, a terminal gets a
live display and a summary, and anything else gets one JSON object a line on stdout, the last one being the summary.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.shortcuts import CAPTION, OCR, Options, one_task, with_options
from pipeline.errors import PipelineError

OK, FAILED, WRONG_USE, TOO_MANY_ERRORS, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SmolVLM over whole buckets: images in, Parquet out.",
)

Limit = Annotated[int | None, typer.Option(help="Take only the first N images of the source.")]
ModelId = Annotated[str | None, typer.Option("--model", help="Checkpoint directory, hub id, or `bundled`.")]
Revision = Annotated[str | None, typer.Option(help="Full commit id of the hub model.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")]
EndpointUrl = Annotated[str | None, typer.Option(help="S3 endpoint for source and output, for stores other than AWS.")]
Gpus = Annotated[
    float | None,
    typer.Option(help="GPUs of each engine replica, 0: CPU. Without a job file 1 where an NVIDIA driver is found."),
]
Replicas = Annotated[tuple[int, int] | None, typer.Option(help="Smallest and largest number of engine replicas.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use (host:port, ray://… or auto); none: this machine.")
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
MaxErrorShare = Annotated[
    float, typer.Option(min=0, max=1, help="Exit with 3 if a larger share of the rows are errors.")
]
Destination = Annotated[str, typer.Option("--output", "-o", help="Where the Parquet files go: any URL or a folder.")]
SourceUri = Annotated[str, typer.Argument(metavar="SRC", help="Images, tars, Parquet or a list: any URL or path.")]


@app.command()
def run(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml")],
    limit: Limit = None,
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    replicas: Replicas = None,
    address: Address = None,
    max_error_share: MaxErrorShare = 0.05,
    as_json: Json = False,
) -> None:
    """Run a job file; run it again to resume."""
    from jobs import documents

    options = Options(limit, model, revision, dtype, endpoint_url, gpus, replicas)
    with _plain_errors():
        content = documents.read(job_file)
        _run(with_options(content, options), str(job_file), address, max_error_share, as_json)


def _one_task_command(task: Mapping[str, Any]) -> Callable[..., None]:
    def command(
        source: SourceUri,
        output: Destination,
        limit: Limit = None,
        model: ModelId = None,
        revision: Revision = None,
        dtype: Dtype = None,
        endpoint_url: EndpointUrl = None,
        gpus: Gpus = None,
        replicas: Replicas = None,
        address: Address = None,
        max_error_share: MaxErrorShare = 0.05,
        as_json: Json = False,
    ) -> None:
        options = Options(limit, model, revision, dtype, endpoint_url, gpus, replicas)
        with _plain_errors():
            content = with_options(one_task(task, source, output), options)
            _run(content, str(task["name"]), address, max_error_share, as_json)

    return command


app.command("caption", help="Describe every image of SRC.")(_one_task_command(CAPTION))
app.command("ocr", help="Transcribe the text of every image of SRC.")(_one_task_command(OCR))


@app.command()
def verify(
    destination: Annotated[str, typer.Argument(metavar="DEST")],
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
) -> None:
    """Check that every input of DEST has exactly one row; exit with 1 if not."""
    from jobs.verify import verify as check

    with _plain_errors():
        report = check(destination, endpoint_url)
    print(json.dumps(report.to_json()) if as_json else report.to_text())
    raise typer.Exit(OK if report.passed else FAILED)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result; replaced.")] = Path(
        "demo-output"
    ),
) -> None:
    """Run the main job on a few drawn images, from a local S3 server to Parquet."""
    from jobs.demo import run_demo

    with _plain_errors():
        run_demo(output)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file."""
    from jobs.spec import schema_text

    print(schema_text(), end="")


def main() -> None:
    """Entry point of the console script."""
    app()


def _run(content: Mapping[str, Any], origin: str, address: str | None, max_error_share: float, as_json: bool) -> None:
    from jobs.spec import parse

    job = parse(content, origin).to_job()
    from jobs.progress import display, summary_object, summary_text
    from jobs.run import execute

    with display(sys.stderr if as_json else sys.stdout) as shown:
        summary = execute(job, shown, address)
    human = sys.stdout.isatty() and not as_json
    print(summary_text(summary) if human else json.dumps(summary_object(summary)))
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(TOO_MANY_ERRORS if summary.error > max_error_share * summary.rows else OK)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what a user can cause into one message on stderr and its exit code."""
    try:
        yield
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USE) from None
    except KeyboardInterrupt:
        print("aborted: what was committed stays; run the same job again to finish it", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
