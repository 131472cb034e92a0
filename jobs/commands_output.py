"""`smolvlm verify`, `status`, `retry` and `report`, about an output that is there: parse, call, print."""

import json
import sys
import time
from typing import Annotated

import typer

from jobs.command_line import (
    FAILED,
    INTERRUPTED,
    OK,
    TOO_MANY_ERRORS,
    WRONG_USE,
    Address,
    EndpointUrl,
    Gpus,
    Json,
    MaxErrorShare,
    ModelId,
    Replicas,
    Revision,
    plain_errors,
)
from jobs.commands_cluster import print_status
from jobs.shortcuts import Options

Output = Annotated[str, typer.Argument(metavar="DEST", help="Output of a job: the URL or folder given to it.")]
_WATCH_EVERY_S = 10.0


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (verify, status, retry, report):
        app.command()(command)


def verify(destination: Output, endpoint_url: EndpointUrl = None, as_json: Json = False) -> None:
    """Check that every input of DEST has exactly one row and every file is as it was written; exit with 1 if not."""
    from jobs.verify import verify as check

    with plain_errors("interrupted"):
        found = check(destination, endpoint_url)
    print(json.dumps(found.to_json()) if as_json else found.to_text())
    raise typer.Exit(OK if found.passed else FAILED)


def status(
    destination: Output,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every ten seconds until it ends.")] = False,
    endpoint_url: EndpointUrl = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of a cluster; DEST is then the id of a job submitted to it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how far the job of DEST is, from what stands in DEST alone; with --address, how a submitted job is doing."""
    if address is not None:
        print_status(destination, address, as_json)
        return
    from jobs.status import status as look

    if watch and as_json:
        print("error: --watch with --json: that would be more than one object; leave one of them out", file=sys.stderr)
        raise typer.Exit(WRONG_USE)
    with plain_errors("interrupted: the job goes on"):
        found = look(destination, endpoint_url)
        print(json.dumps(found.to_json()) if as_json else found.to_text(), flush=True)
        while watch and found.state in ("listing", "running"):
            time.sleep(_WATCH_EVERY_S)
            found = look(destination, endpoint_url)
            print(f"\n{found.to_text()}", flush=True)


def retry(
    destination: Output,
    code: Annotated[list[str] | None, typer.Option(help="Only rows with this error; may be repeated.")] = None,
    model: ModelId = None,
    revision: Revision = None,
    endpoint_url: EndpointUrl = None,
    gpus: Gpus = None,
    replicas: Replicas = None,
    address: Address = None,
    max_error_share: MaxErrorShare = 0.05,
    as_json: Json = False,
) -> None:
    """Run the error rows of DEST again and put what comes out in their places."""
    options = Options(model=model, revision=revision, endpoint_url=endpoint_url, gpus=gpus, replicas=replicas)
    with plain_errors("aborted: the output is whole; retry it again to go on"):
        from jobs.progress import display
        from jobs.retry import retried_object, retried_text
        from jobs.retry import retry as run_again

        with display(sys.stderr if as_json else sys.stdout) as shown:
            done = run_again(destination, code or (), options, shown, address)
    human = sys.stdout.isatty() and not as_json
    print(retried_text(done) if human else json.dumps(retried_object(done)))
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(TOO_MANY_ERRORS if done.error > max_error_share * done.inputs else OK)


def report(
    destination: Output,
    samples: Annotated[int, typer.Option(min=1, max=5000, help="Rows to show, of every kind some.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Another seed shows other rows.")] = 0,
    endpoint_url: EndpointUrl = None,
    as_json: Json = False,
) -> None:
    """Write DEST/report.html: pictures with their texts, errors, speed; one page that loads nothing else."""
    with plain_errors("interrupted: no report was written"):
        from jobs.report import gather, write

        gallery = gather(destination, endpoint_url, samples, seed)
        page = write(gallery)
    facts = {"report": page, "rows": gallery.rows, "samples": len(gallery.samples), "no_picture": gallery.num_blank}
    print(json.dumps(facts) if as_json else page)
