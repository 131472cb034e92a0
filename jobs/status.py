"""How far a job is, from its destination alone: no driver, no Ray is asked."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.progress import duration
from jobs.stored import stored_job
from pipeline import ranges
from pipeline.commit import Commit, committed_counts, committed_rows, read_columns, read_commits
from pipeline.finish import errors_by_code, read_success
from pipeline.lease import Holder, holders
from pipeline.manifest import Manifest, load_manifest
from pipeline.ranges import Ranges
from pipeline.storage import Location

State = Literal["listing", "running", "stopped", "finished"]


@dataclass(frozen=True)
class Driver:
    """Who works on the output, and how long ago it last said so."""

    host: str
    pid: int
    heard_s_ago: float


@dataclass(frozen=True)
class Status:
    """Where a job stands. What the manifest must say is None until it is complete.

    `images_per_s` is the rate between the first and the last file of the last run, None before it has two;
    `eta_s` is None unless the job runs.
    """

    name: str
    state: State
    inputs: int | None
    shards: int | None
    shards_done: int
    rows: int
    ok: int
    error: int
    errors_by_code: dict[str, int]
    images_per_s: float | None
    eta_s: float | None
    last_commit_s_ago: float | None
    driver: Driver | None
    output_uri: str

    def to_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return asdict(self)

    def to_text(self) -> str:
        """Return it for a person."""
        lines = [f"{self.name}: {self.state}{self._who()}"]
        if self.inputs is not None:
            lines.append(f"rows    {self.rows:,} of {self.inputs:,} ({self.ok:,} ok, {self.error:,} errors)")
            lines.append(f"shards  {self.shards_done:,} of {self.shards:,}")
        lines += [f"  error {code}: {count:,}" for code, count in self.errors_by_code.items()]
        if self.images_per_s is not None:
            left = f", {duration(self.eta_s)} left" if self.eta_s is not None else ""
            lines.append(f"speed   {self.images_per_s:,.2f} images/s{left}")
        if self.last_commit_s_ago is not None:
            lines.append(f"newest  file written {duration(self.last_commit_s_ago)} ago")
        return "\n".join([*lines, f"output  {self.output_uri}"])

    def _who(self) -> str:
        if self.driver is None:
            return "; run the same job again to finish it" if self.state == "stopped" else ""
        return f" (process {self.driver.pid} on {self.driver.host}, heard of {self.driver.heard_s_ago:.0f} s ago)"


def status(uri: str, endpoint_url: str | None = None) -> Status:
    """Read what the destination holds: footers, and two columns of every file.

    Raises ConfigError if no job has begun there.
    """
    stored = stored_job(uri, endpoint_url)
    destination, now = stored.location, time.time()
    manifest, runs = load_manifest(destination), holders(destination)
    commits = [] if manifest is None else read_commits(destination, manifest.rows_per_shard)
    rows, rate = committed_rows(commits), images_per_s(commits, runs)
    counts: Counter[str] = sum(
        map(committed_counts, read_columns(destination, commits, ("status", "error"))), Counter()
    )
    state = _state(destination, manifest, runs)
    left = 0 if manifest is None else manifest.rows - ranges.count(rows)
    return Status(
        name=stored.job.name,
        state=state,
        inputs=None if manifest is None else manifest.rows,
        shards=None if manifest is None else manifest.num_shards,
        shards_done=0 if manifest is None else shards_done(rows, manifest),
        rows=ranges.count(rows),
        ok=counts["ok"],
        error=counts["error"],
        errors_by_code=errors_by_code(counts),
        images_per_s=rate,
        eta_s=left / rate if rate and state == "running" else None,
        last_commit_s_ago=max(now - max(commit.committed_at for commit in commits), 0.0) if commits else None,
        driver=None if not runs or runs[-1].is_gone else Driver(runs[-1].host, runs[-1].pid, now - runs[-1].beat_at),
        output_uri=uri,
    )


def shards_done(rows: Ranges, manifest: Manifest) -> int:
    """Return how many shards have all their rows in `rows`."""
    size = manifest.rows_per_shard
    first = -(-rows[:, 0] // size)
    last = rows[:, 1] // size + ((rows[:, 1] == manifest.rows) & (rows[:, 1] % size != 0))
    return int((last - first).clip(min=0).sum())


def images_per_s(commits: Sequence[Commit], runs: Sequence[Holder]) -> float | None:
    """Return the rate of the last run that wrote anything.

    The first file's rows were made before it was written, at an unknown time, so counting starts after it.
    """
    newest = max((commit.committed_at for commit in commits), default=0.0)
    began = max((run.started_at for run in runs if run.started_at <= newest), default=0.0)
    times = sorted((commit.committed_at, ranges.count(commit.rows)) for commit in commits)
    times = [(at, rows) for at, rows in times if at >= began]
    if len(times) < 2 or times[-1][0] == times[0][0]:
        return None
    return sum(rows for _, rows in times[1:]) / (times[-1][0] - times[0][0])


def _state(destination: Location, manifest: Manifest | None, runs: Sequence[Holder]) -> State:
    if runs and not runs[-1].is_gone:
        return "listing" if manifest is None else "running"
    return "stopped" if read_success(destination) is None else "finished"
