"""`smolvlm plan`, `preflight`, `submit`, `logs`, `cancel` and `list`: parse, call, print."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.command_line import (
    FAILED,
    INTERRUPTED,
    OK,
    Address,
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
    plain_errors,
)
from jobs.shortcuts import Options, with_options
from pipeline.job import Job

if TYPE_CHECKING:
    from jobs.submit import Submitted

Dashboard = Annotated[
    str, typer.Option("--address", help="Address of the cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")
]
SubmissionId = Annotated[str, typer.Argument(metavar="ID", help="Submission id, as `submit` and `list` print it.")]
Secrets = Annotated[
    list[str] | None, typer.Option("--secret", help="Name of a variable that every node must have; may be repeated.")
]
_LOCAL_DASHBOARD = "http://127.0.0.1:8265"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (plan, preflight, submit, logs, cancel):
        app.command()(command)
    app.command("list")(list_jobs)


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
    quantization: Quantization = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    as_json: Json = False,
) -> None:
    """Say what a job will read, how long it will take, what it will cost and what holds it back; starts nothing."""
    with plain_errors("interrupted: nothing was written"):
        job = _job(job_file, Options(limit, model, revision, dtype, quantization, endpoint_url, gpus))
        from jobs.plan import Figures, Pool, to_json
        from jobs.plan import plan as make_plan

        pool, figures = Pool(gpu, replicas, cpus, price), Figures(profile, save_profile, output_tokens)
        made = make_plan(job, pool, figures, sample, lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps(to_json(made)))
        return
    from rich.console import Console

    from jobs.plan_text import print_plan

    print_plan(made, Console())


def preflight(job_file: JobFile, address: Address = "auto", secret: Secrets = None, as_json: Json = False) -> None:
    """Check that the cluster can run a job: versions, GPUs, storage, weights, memory, clocks. Run it on the cluster."""
    with plain_errors("interrupted"):
        job = _job(job_file, Options())
        from jobs.run import ray_session
        from jobs.submit import check_names

        check_names(secret or ())
        with ray_session(address):
            from jobs.preflight import preflight as check

            checks = check(job, secret or ())
    failed = [each for each in checks if not each.passed]
    if as_json:
        print(json.dumps({"passed": not failed, "checks": [asdict(each) for each in checks]}))
    else:
        for each in checks:
            print(f"{'ok  ' if each.passed else 'FAIL'} {each.name:<12}{each.node:<22}{each.found}")
            if not each.passed:
                print(f"     → {each.remedy}")
    raise typer.Exit(FAILED if failed else OK)


def submit(
    job_file: JobFile,
    address: Dashboard = _LOCAL_DASHBOARD,
    wait: Annotated[bool, typer.Option(help="Show what the job prints until it ends, and exit as it does.")] = True,
    secret: Secrets = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="The nodes have the package; send the job file alone.")
    ] = False,
    preflight: Annotated[bool, typer.Option(help="Check the cluster before the run.")] = True,
    limit: Limit = None,
    model: ModelId = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    replicas: Replicas = None,
    max_error_share: MaxErrorShare = 0.05,
    as_json: Json = False,
) -> None:
    """Hand a job to a cluster. Ctrl-C stops watching, not the job."""
    with plain_errors("the job goes on; `smolvlm cancel` stops it"):
        job = _job(job_file, Options(limit, model, revision, dtype, quantization, endpoint_url, gpus, replicas))
        from jobs.submit import Cluster, Shipping, exit_code

        cluster = Cluster(address)
        submission_id = cluster.submit(job, Shipping(installed, tuple(secret or ()), preflight, max_error_share))
        print(_useful_commands(submission_id, cluster.address, job.output.uri), file=sys.stderr)
        if wait:
            for text in cluster.follow(submission_id):
                print(text, end="", file=sys.stderr if as_json else sys.stdout, flush=True)
        found = cluster.wait(submission_id) if wait else cluster.status(submission_id)
    _print_submitted(found, as_json)
    raise typer.Exit(exit_code(found, FAILED, INTERRUPTED) if wait else OK)


def logs(
    submission_id: SubmissionId,
    address: Dashboard = _LOCAL_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Show what a submitted job's driver has printed."""
    with plain_errors("the job goes on"):
        from jobs.submit import Cluster

        cluster = Cluster(address)
        for text in cluster.follow(submission_id) if follow else [cluster.logs(submission_id)]:
            print(text, end="", flush=True)


def cancel(
    submission_id: SubmissionId,
    address: Dashboard = _LOCAL_DASHBOARD,
    wait: Annotated[bool, typer.Option(help="Wait until images under way are finished and committed.")] = True,
    as_json: Json = False,
) -> None:
    """Stop a submitted job cleanly; submit the same job file again to go on."""
    with plain_errors("still stopping"):
        from jobs.submit import Cluster

        cluster = Cluster(address)
        cluster.cancel(submission_id)
        found = cluster.wait(submission_id) if wait else cluster.status(submission_id)
    _print_submitted(found, as_json)


def list_jobs(address: Dashboard = _LOCAL_DASHBOARD, as_json: Json = False) -> None:
    """List the jobs that were submitted to a cluster, the newest first."""
    with plain_errors("interrupted"):
        from jobs.submit import Cluster

        found = Cluster(address).list()
    if as_json:
        print(json.dumps({"jobs": [asdict(each) for each in found]}))
        return
    for each in found:
        print(f"{each.state:<10} {each.id}  {each.output}")


def print_status(submission_id: str, address: str, as_json: bool) -> None:
    """Print how a submitted job is doing: `smolvlm status` with an address."""
    with plain_errors("interrupted: the job goes on"):
        from jobs.submit import Cluster

        found = Cluster(address).status(submission_id)
    _print_submitted(found, as_json)


def _print_submitted(found: "Submitted", as_json: bool) -> None:
    print(json.dumps(asdict(found)) if as_json else f"{found.id}: {found.state.lower()}; {found.message}")


def _useful_commands(submission_id: str, address: str, output: str) -> str:
    commands = [
        f"smolvlm logs --follow {submission_id} --address {address}",
        f"smolvlm status {submission_id} --address {address}",
        f"smolvlm cancel {submission_id} --address {address}",
        f"smolvlm verify {output}",
    ]
    return "\n  ".join([f"submitted {submission_id}", *commands])


def _job(job_file: Path, options: Options) -> Job:
    from jobs import documents
    from jobs.spec import parse

    return parse(with_options(documents.read(job_file), options), str(job_file)).to_job()
