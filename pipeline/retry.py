"""The error rows of a finished output, run again through the same stages; see `pipeline.replace` for how they go in."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline import ranges
from pipeline.claim import check_claim
from pipeline.commit import committed_rows, read_commits
from pipeline.control import Control
from pipeline.errors import ConfigError
from pipeline.execute import execute
from pipeline.finish import errors_by_code, read_success, read_totals, total_counts, write_success
from pipeline.generate import AnswererFactory
from pipeline.job import Job
from pipeline.lease import Lease
from pipeline.limits import hourly_cost
from pipeline.manifest import Manifest, load_manifest
from pipeline.progress import Progress, ProgressReporter
from pipeline.replace import ErrorRows, find_errors, replace_errors, waiting
from pipeline.run import answerer_for, disjoint_commits, resources_for, sink_for
from pipeline.storage import Location


@dataclass(frozen=True)
class Retried:
    """What a retry did. `inputs`, `ok` and the errors are those of the output afterwards.

    `retried` rows were run again and `recovered` of them are ok now; `hopeless` ones were left alone, because they were
    found bad when the source was listed.
    """

    inputs: int
    ok: int
    error: int
    errors_by_code: dict[str, int]
    retried: int
    recovered: int
    hopeless: int
    elapsed_s: float
    interrupted: bool
    output_uri: str


def retry(
    job: Job,
    codes: frozenset[str] | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    drain: threading.Event | None = None,
    say: Callable[[str], None] | None = None,
    answerer_factory: AnswererFactory | None = None,
) -> Retried:
    """Run the error rows of these codes, or of all, again and put what comes out in their places.

    Ray must be running. Setting `drain` lets what is in flight finish and replaces those rows. `say` is told what the
    run waits for, if an autoscaler has to add nodes first. The job's limits do not hold. Raises ConfigError if the
    output is not finished or not this job's, LeaseHeld if another driver is at it, PipelineError if it fails midway;
    the output is whole at every moment, and the next retry goes on from there.
    """
    started = time.monotonic()
    destination = Location(job.output.uri, job.output.endpoint_url)
    check_claim(destination, job)
    resources = resources_for(job, say)
    with Lease(destination, hourly_cost(job)) as lease:
        manifest = _finished_manifest(destination)
        replace_errors(destination, manifest, lease.fence)  # what an interrupted retry has left
        found = find_errors(destination, manifest, codes)
        pending, control, factory = found.pending, Control.create(), answerer_factory or answerer_for
        sink = sink_for(job, waiting(destination), manifest, ranges.count(pending), lease.fence, control)
        with ProgressReporter(control, ranges.count(pending), 0, on_progress, drain):
            if len(pending):
                execute(job, destination, manifest, pending, resources, sink, factory, control)
        lease.check()
        retried = replace_errors(destination, manifest, lease.fence)
        return _finish(destination, manifest, found, retried, time.monotonic() - started)


def _finished_manifest(destination: Location) -> Manifest:
    manifest = load_manifest(destination)
    if manifest is None:
        raise ConfigError(f"{destination.uri}: no complete manifest here, so nothing to retry; run the job first")
    missing = manifest.rows - ranges.count(committed_rows(disjoint_commits(destination, manifest)))
    if missing:
        raise ConfigError(
            f"{destination.uri}: {missing} of {manifest.rows} rows are missing; run the job to its end before a retry"
        )
    return manifest


def _finish(destination: Location, manifest: Manifest, found: ErrorRows, retried: int, elapsed_s: float) -> Retried:
    files = read_totals(destination, read_commits(destination, manifest.rows_per_shard))
    totals = total_counts(files)
    if read_success(destination) is None:
        write_success(destination, files, manifest.rows, elapsed_s)
    return Retried(
        inputs=manifest.rows,
        ok=totals["ok"],
        error=totals["error"],
        errors_by_code=errors_by_code(totals),
        retried=retried,
        recovered=found.total - totals["error"],
        hopeless=found.hopeless,
        elapsed_s=elapsed_s,
        interrupted=retried < ranges.count(found.pending),
        output_uri=destination.uri,
    )
