"""`smolvlm plan`: parse, call, print."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.command_line import (
    Dtype,
    EndpointUrl,
    Gpus,
    JobFile,
    Json,
    Limit,
    ModelId,
    Revision,
    plain_errors,
)
from jobs.shortcuts import Options, with_options
from pipeline.job import Job


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(plan)


def plan(
    job_file: JobFile,
    gpu: Annotated[str | None, typer.Option(help="GPU that the figures must be of, e.g. h100.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engine replicas: the job's largest number.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPU cores of the whole pool.")] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="What one replica costs an hour, with its part of all machines.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Images to read and decode.")] = 200,
    profile: Annotated[Path | None, typer.Option(help="Recorded figures of an engine, instead of trying it.")] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Record the figures of the engine tried here.")] = None,
    output_tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of all answers about an image, if you know better.")
    ] = None,
    limit: Limit = None,
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    as_json: Json = False,
) -> None:
    """Say what a job will read, how long it will take, what it will cost and what holds it back; starts nothing."""
    with plain_errors("interrupted: nothing was written"):
        job = _job(job_file, Options(limit, model, revision, dtype, endpoint_url, gpus))
        from jobs.plan import Figures, Pool, to_json
        from jobs.plan import plan as make_plan
        from jobs.run import fetch_checkpoint

        fetch_checkpoint(job.model)
        pool, figures = Pool(gpu, replicas, cpus, price), Figures(profile, save_profile, output_tokens)
        made = make_plan(job, pool, figures, sample, lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps(to_json(made)))
        return
    from rich.console import Console

    from jobs.plan_text import print_plan

    print_plan(made, Console())


def _job(job_file: Path, options: Options) -> Job:
    from jobs import documents
    from jobs.spec import parse

    return parse(with_options(documents.read(job_file), options), str(job_file)).to_job()
