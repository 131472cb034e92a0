"""`smolvlm …`: parse, call, print.

Exit codes: 0 done, 1 verify found something or the run broke, 2 wrong use, 3 too many error rows, 4 stopped at a limit
of the job, 130 interrupted.

Output: with --json, stdout holds exactly one JSON object and progress goes to stderr. Without it, a terminal gets a
live display and a summary, and anything else gets one JSON object a line on stdout, the last one being the summary.
"""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import commands_cluster, commands_output
from jobs.command_line import (
    FAILED,
    INTERRUPTED,
    LIMIT_REACHED,
    OK,
    TOO_MANY_ERRORS,
    Address,
    Destination,
    Dtype,
    EndpointUrl,
    Gpus,
    JobFile,
    Json,
    Limit,
    MaxErrorShare,
    ModelId,
    Quantization,
    Replicas,
    Revision,
    SourceUri,
    needs_extra,
    plain_errors,
)
from jobs.shortcuts import CAPTION, OCR, Options, has_gpu, one_task, with_options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="SmolVLM over whole buckets: images in, Parquet out.",
)


@app.command()
def run(
    job_file: JobFile,
    limit: Limit = None,
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    replicas: Replicas = None,
    address: Address = None,
    max_error_share: MaxErrorShare = 0.05,
    as_json: Json = False,
) -> None:
    """Run a job file; run it again to resume."""
    from jobs import documents

    options = Options(limit, model, revision, dtype, quantization, endpoint_url, gpus, replicas)
    with plain_errors():
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
        quantization: Quantization = None,
        endpoint_url: EndpointUrl = None,
        gpus: Gpus = None,
        replicas: Replicas = None,
        address: Address = None,
        max_error_share: MaxErrorShare = 0.05,
        as_json: Json = False,
    ) -> None:
        options = Options(limit, model, revision, dtype, quantization, endpoint_url, gpus, replicas)
        with plain_errors():
            content = with_options(one_task(task, source, output), options)
            _run(content, str(task["name"]), address, max_error_share, as_json)

    return command


app.command("caption", help="Describe every image of SRC.")(_one_task_command(CAPTION))
app.command("ocr", help="Transcribe the text of every image of SRC.")(_one_task_command(OCR))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result; replaced.")] = Path(
        "demo-output"
    ),
) -> None:
    """Run the main job on a few drawn images, from a local S3 server to Parquet."""
    from jobs.demo import run_demo

    with plain_errors():
        run_demo(output)


@app.command()
def chat(
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    url: Annotated[str | None, typer.Option(help="Talk to a running endpoint instead of loading a model.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the endpoint's key.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures from the internet as well.")] = False,
    history: Annotated[int, typer.Option(min=0, help="Past answers that stay in the prompt.")] = 2,
    tiles: Annotated[int | None, typer.Option(min=1, help="The most tiles a picture may make.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat what was drawn.")] = None,
) -> None:
    """Talk about pictures: `img>` takes a path, `txt>` a question, /help tells the rest."""
    from jobs.chat import open_model, talk
    from jobs.chat_models import AnswerOptions
    from smolvlm.chat import Conversation

    wanted = Options(model=model, revision=revision, dtype=dtype, quantization=quantization)
    with plain_errors("interrupted"):
        answerer = open_model(wanted, url, api_key_file)
        options = AnswerOptions(max_new_tokens, temperature, top_p, seed)
        passed = talk(answerer, Conversation(history, tiles), options, allow_urls)
    raise typer.Exit(OK if passed else FAILED)


@app.command()
def train(
    training_file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for checkpoints and model.")] = None,
    as_json: Json = False,
) -> None:
    """Train or fine-tune a model as the file says; run it again to go on where it stopped."""
    with plain_errors("aborted: the last checkpoint stays; run the same command again to go on"):
        with needs_extra("train"):
            from jobs import train as training
            from jobs.training_file import load
            from jobs.training_progress import display
            from smolvlm.training.loop import TrainingDiverged
        plan = load(training_file, output)
        try:
            with display(sys.stderr if as_json else sys.stdout) as shown:
                summary = training.train(plan, shown)
        except TrainingDiverged as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from None
    human = sys.stdout.isatty() and not as_json
    print(training.summary_text(summary) if human else json.dumps(training.summary_object(summary)))
    raise typer.Exit(INTERRUPTED if summary.interrupted else OK)


@app.command()
def evaluate(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the report; an earlier one goes.")],
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or `bundled`.")] = "bundled",
    revision: Revision = None,
    source: Annotated[
        str | None, typer.Option(help="Labelled images: Parquet, a list or tars. Without it: built-in documents.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text of an image: `text`.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Image column of Parquet, URI column of a list.")] = None,
    kind_column: Annotated[str | None, typer.Option(help="Column to report by, such as a document's kind.")] = None,
    degraded_column: Annotated[str | None, typer.Option(help="Boolean column: whether an image is a bad one.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Number of built-in documents: 500.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the built-in documents: 7.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N.")] = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = str(OCR["prompt"]),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = int(str(OCR["max_new_tokens"])),
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Quantization = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU where there is one.")] = None,
    endpoint_url: EndpointUrl = None,
    max_error_share: MaxErrorShare = 0.05,
    as_json: Json = False,
) -> None:
    """Measure how well a model reads labelled images: error rates by kind of document, and the worst cases."""
    with plain_errors("interrupted: no report was written"), needs_extra("train"):
        from jobs.evaluate import Data
        from jobs.evaluate import evaluate as measure
        from jobs.evaluation_report import summary_text
        from jobs.readings import Settings
        from pipeline.storage import Location

        columns = (image_column, text_column, kind_column, degraded_column)
        data = Data(source, *columns, endpoint_url, documents, seed, limit)
        place = device or ("cuda" if has_gpu() else "cpu")
        settings = Settings(model, revision, dtype, quantization, place, prompt, max_new_tokens)
        content = measure(data, settings, Location(output, endpoint_url), sys.stderr)
    print(summary_text(content) if sys.stdout.isatty() and not as_json else json.dumps(content))
    raise typer.Exit(TOO_MANY_ERRORS if len(content["errors"]) > max_error_share * content["documents"] else OK)


@app.command()
def documents(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for PNGs and labels.jsonl.")],
    split: Annotated[str, typer.Option(help="held_out or train: fonts and texts of one are not in the other.")] = (
        "held_out"
    ),
    count: Annotated[int, typer.Option(min=1, help="Number of documents.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other documents.")] = 7,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Write built-in documents with their texts, for measuring other readers on what `evaluate` measures."""
    with plain_errors("interrupted: labels.jsonl was not written"), needs_extra("train"):
        from jobs.generated import draw, write_documents
        from pipeline.storage import Location

        write_documents(draw(split, seed, count), Location(output, endpoint_url))


@app.command()
def serve(
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on: 127.0.0.1. Others need API keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on: 8000.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File with one API key a line, or sha256:… of it.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer other machines without a key.")] = False,
    allow_image_host: Annotated[
        list[str] | None, typer.Option(help="Host that images may be fetched from, or *.domain; may be repeated.")
    ] = None,
    gpus: Gpus = None,
    replicas: Replicas = None,
    address: Address = None,
) -> None:
    """Answer requests over HTTP as OpenAI's API does, until interrupted."""
    from jobs import serve as endpoint

    options = Options(
        model=model, revision=revision, dtype=dtype, quantization=quantization, gpus=gpus, replicas=replicas
    )
    given = {"host": host, "port": port, "api_key_file": api_key_file, "allowed_image_hosts": allow_image_host}
    with plain_errors("aborted: requests under way were dropped"):
        content = endpoint.content_of(options, {**given, "insecure": insecure})
        wanted = endpoint.parse(content, "serve").to_options()
        endpoint.serve(
            wanted, _say_started, lambda: print("stopping: requests under way are answered", file=sys.stderr), address
        )


def _say_started(started: Any) -> None:
    if not sys.stdout.isatty():
        print(json.dumps({"event": "serving", **vars(started)}), flush=True)
        return
    print(f"{started.model} answers at {started.url}; Ctrl-C ends it")
    print(f"  page       {started.url}/")
    print(f"  OpenAI     base_url={started.url}/v1 model={started.model}")
    print(f"  batch job  engine: {{mode: shared}} and --address {started.ray_address}", flush=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file."""
    from jobs.spec import schema_text

    print(schema_text(), end="")


commands_cluster.register(app)
commands_output.register(app)


def main() -> None:
    """Entry point of the console script."""
    # Scripts start their background jobs with SIGINT ignored; one that is sent all the same means what it says.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    if summary.interrupted or summary.stopped_by:
        raise typer.Exit(INTERRUPTED if summary.interrupted else LIMIT_REACHED)
    raise typer.Exit(TOO_MANY_ERRORS if summary.error > max_error_share * summary.rows else OK)
