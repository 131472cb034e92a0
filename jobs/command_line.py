"""What the commands have in common: exit codes, options, and how they say what went wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError, LeaseHeld, PipelineError

OK, FAILED, WRONG_USE, TOO_MANY_ERRORS, LIMIT_REACHED, INTERRUPTED = 0, 1, 2, 3, 4, 130

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml")]
Limit = Annotated[int | None, typer.Option(help="Take only the first N images of the source.")]
ModelId = Annotated[str | None, typer.Option("--model", help="Checkpoint directory, hub id, or `bundled`.")]
Revision = Annotated[str | None, typer.Option(help="Full commit id of the hub model.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto (bfloat16 where the hardware is fast at it), bfloat16, float16 or float32.")
]
Quantization = Annotated[
    str | None, typer.Option(help="Round weights to 8 bits, for speed: int8 on CPUs, fp8 on GPUs (Ada, Hopper).")
]
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


@contextmanager
def plain_errors(
    interrupted: str = "aborted: what was committed stays; run the same job again to finish it",
) -> Iterator[None]:
    """Turn what a user can cause into one message on stderr and its exit code."""
    try:
        yield
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USE if isinstance(error, ConfigError | LeaseHeld) else FAILED) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Say how to install what a command needs beyond the package's own dependencies."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f"pip install -c constraints.txt -e '.[{name}]'"
        raise ConfigError(f"this command needs the package {error.name}, which is not installed: {remedy}") from error
