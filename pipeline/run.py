"""A job from its first listing to `_SUCCESS.json`: the whole story is `run`."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import ray

from pipeline import ranges
from pipeline.claim import check_claim, claim, file_metadata
from pipeline.commit import Commit, committed_rows, read_commits
from pipeline.control import Control
from pipeline.engine_worker import EngineWorker
from pipeline.errors import ConfigError, PipelineError
from pipeline.execute import execute
from pipeline.finish import errors_by_code, read_totals, resolve_overlaps, total_counts, write_success
from pipeline.generate import Answerer, AnswererFactory
from pipeline.job import Job
from pipeline.lease import Fence, Lease, holders
from pipeline.limits import Clock, check_deadline, hourly_cost, within_max_images
from pipeline.manifest import Manifest, load_manifest, write_manifest
from pipeline.progress import Progress, ProgressReporter
from pipeline.records import output_schema
from pipeline.resources import Resources, plan_resources
from pipeline.sink import CommitSink
from pipeline.source import Expand, InputBatch, manifest_tables
from pipeline.storage import Location
from smolvlm.config import ImageConfig
from smolvlm.hub import resolve_checkpoint

_INDEX_TASKS_AT_ONCE = 32


@dataclass(frozen=True)
class Summary:
    """What a run did. Rows and errors are those of the destination, earlier runs included.

    `stopped_by` names the limit that ended the run, if one did before all rows were there.
    """

    inputs: int
    rows: int
    ok: int
    error: int
    errors_by_code: dict[str, int]
    resumed_rows: int
    output_tokens: int
    compressed_bytes: int
    tile_bytes: int
    elapsed_s: float
    images_per_s: float
    interrupted: bool
    stopped_by: str | None
    output_uri: str


def run(
    job: Job,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    drain: threading.Event | None = None,
    say: Callable[[str], None] | None = None,
    answerer_factory: AnswererFactory | None = None,
) -> Summary:
    """Bring the destination to one row for every input of the source, and say what it took.

    Ray must be running. Setting `drain` lets what is in flight finish and leaves the rest to a resume. `say` is told
    what the run waits for, if an autoscaler has to add nodes first.
    Raises ConfigError before any actor starts if the job cannot run as written, LeaseHeld if another driver is at it,
    PipelineError if it fails midway; what was committed stays, and the next run goes on from there.
    `answerer_factory` takes the place of the engines that the job names.
    """
    started = time.monotonic()
    destination = Location(job.output.uri, job.output.endpoint_url)
    check_destination(job)
    check_deadline(job.limits)
    resources = resources_for(job, say)
    check_claim(destination, job)
    with Lease(destination, hourly_cost(job)) as lease:
        claim(destination, job)
        manifest = load_manifest(destination) or _write_manifest(destination, job)
        done = committed_rows(disjoint_commits(destination, manifest))
        pending = within_max_images(ranges.complement(done, manifest.rows), done, job.limits)
        end = ranges.count(done) + ranges.count(pending)
        control = Control.create()
        sink = sink_for(job, destination, manifest, manifest.rows, lease.fence, control)
        clock = Clock(job, holders(destination), control.drain)
        with ProgressReporter(control, end, ranges.count(done), on_progress, drain), clock:
            if len(pending) and not clock.reached:
                execute(job, destination, manifest, pending, resources, sink, answerer_factory or answerer_for, control)
        lease.check()
        elapsed_s = time.monotonic() - started
        return _finish(destination, manifest, control, ranges.count(done), end, clock.reached, elapsed_s)


def resources_for(job: Job, say: Callable[[str], None] | None) -> Resources:
    """Return the sizes for the running cluster, and tell `say` what has to come first. Raises ConfigError where the job
    does not fit it."""
    image_config = ImageConfig.from_pretrained(resolve_checkpoint(job.model.id, job.model.revision))
    resources = plan_resources(job, image_config, _endpoint_sequences(job))
    if resources.awaited and say is not None:
        say(resources.awaited)
    return resources


def answerer_for(job: Job) -> Answerer:
    """Return the engine that the job names."""
    if job.engine.mode == "dedicated":
        return EngineWorker.for_job(job)
    from pipeline.shared import SharedAnswerer  # Ray Serve is an extra that other jobs do without

    return SharedAnswerer(job)


def _endpoint_sequences(job: Job) -> int | None:
    if job.engine.mode == "dedicated":
        return None
    from pipeline.shared import check_endpoint

    return check_endpoint(job)


def check_destination(job: Job) -> None:
    """Raise ConfigError if the rows would land among the inputs."""
    source = Location(job.source.uri, job.source.endpoint_url)
    output = Location(job.output.uri, job.output.endpoint_url)
    if source.protocol == output.protocol and f"{output.path}/".startswith(f"{source.path}/"):
        raise ConfigError(
            f"output.uri {output.uri} lies inside source.uri {source.uri}: its files would be "
            "read as inputs. Choose another place."
        )


def sink_for(
    job: Job, destination: Location, manifest: Manifest, rows: int, fence: Fence, control: Control
) -> CommitSink:
    """Return the sink of a run over `rows` rows."""
    return CommitSink(
        destination=destination,
        schema=output_schema(job.tasks),
        rows_per_shard=manifest.rows_per_shard,
        rows_per_file=job.output.rows_per_file or _rows_per_file(rows),
        metadata=file_metadata(job),
        fence=fence,
        control=control,
    )


def _write_manifest(destination: Location, job: Job) -> Manifest:
    manifest = write_manifest(destination, manifest_tables(job.source, _expand_on_cluster), job.limit)
    if not manifest.rows:
        destination.child("_manifest").child("_complete.json").delete()
        destination.child("_job.json").delete()
        raise ConfigError(
            f"source.uri {job.source.uri}: no image, tar or Parquet file found"
            + (f" that matches {job.source.glob!r}" if job.source.glob else "")
            + ". Check the address, source.format and source.glob."
        )
    return manifest


def _expand_on_cluster(expand: Expand, batches: Iterable[InputBatch]) -> Iterator[list[pa.Table]]:
    """Index archives with Ray tasks, a bounded number at a time, in order; plain objects need no task."""
    remote_expand = ray.remote(num_cpus=0.5, max_retries=3)(expand)
    waiting: list[ray.ObjectRef[list[pa.Table]]] = []
    for batch in batches:
        if batch.kind != "object":
            waiting.append(remote_expand.remote(batch))
        # Rows of plain objects do not wait for others: those of many batches would fill the driver.
        while waiting and (batch.kind == "object" or len(waiting) >= _INDEX_TASKS_AT_ONCE):
            yield ray.get(waiting.pop(0))
        if batch.kind == "object":
            yield expand(batch)
    yield from map(ray.get, waiting)


def disjoint_commits(destination: Location, manifest: Manifest) -> list[Commit]:
    """Return the commits of the destination, overlaps resolved."""
    return resolve_overlaps(destination, read_commits(destination, manifest.rows_per_shard), manifest)


def _rows_per_file(rows: int) -> int:
    """Small jobs commit often, large ones write files that a reader likes."""
    return min(max(rows // 256, 32), 4096)


def _finish(
    destination: Location,
    manifest: Manifest,
    control: Control,
    resumed_rows: int,
    end: int,
    limit: str | None,
    elapsed_s: float,
) -> Summary:
    commits = disjoint_commits(destination, manifest)
    rows = ranges.count(committed_rows(commits))
    counts = control.counts()
    is_whole = rows == manifest.rows
    if rows == end:
        limit = None if is_whole else "max_images"
    elif not (limit or control.is_draining()):
        raise PipelineError(
            f"{destination.uri}: {manifest.rows - rows} of {manifest.rows} rows are missing. Run it again."
        )
    files = read_totals(destination, commits)
    totals = total_counts(files)
    if is_whole:
        write_success(destination, files, manifest.rows, elapsed_s)
    return Summary(
        inputs=manifest.rows,
        rows=rows,
        ok=totals["ok"],
        error=totals["error"],
        errors_by_code=errors_by_code(totals),
        resumed_rows=resumed_rows,
        output_tokens=counts["tokens"],
        compressed_bytes=counts["compressed_bytes"],
        tile_bytes=counts["tile_bytes"],
        elapsed_s=elapsed_s,
        images_per_s=(rows - resumed_rows) / elapsed_s,
        interrupted=not (is_whole or limit),
        stopped_by=limit,
        output_uri=destination.uri,
    )
