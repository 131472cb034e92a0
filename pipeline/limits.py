"""`limits:` of a job: rows are counted before a run starts; a clock ends it when its time or money is up.

What earlier runs cost stands in their leases, whose heartbeats also tell how long a killed driver lived.
"""

import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from types import TracebackType

from pipeline import ranges
from pipeline.errors import ConfigError
from pipeline.job import Job, Limits
from pipeline.lease import Holder
from pipeline.ranges import Ranges

_HOUR_S = 3600.0


def hourly_cost(job: Job) -> float:
    """Return what an hour of a run costs at most, 0 where the job names no price."""
    return (job.limits.price_per_hour or 0.0) * job.engine.replicas[1]


def spent(holders: Iterable[Holder]) -> float:
    """Return what the runs of these holders have cost."""
    return sum((each.beat_at - each.started_at) / _HOUR_S * each.hourly_cost for each in holders)


def check_deadline(limits: Limits) -> None:
    """Raise ConfigError if `finish_by` has passed."""
    if limits.finish_by is not None and _seconds_until(limits.finish_by) <= 0:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        raise ConfigError(f"limits.finish_by: {limits.finish_by} has passed, it is {now}; set a later time or none")


def within_max_images(pending: Ranges, done: Ranges, limits: Limits) -> Ranges:
    """Return as many of the pending rows, the first ones, as the output may still take."""
    if limits.max_images is None:
        return pending
    room = max(limits.max_images - ranges.count(done), 0)
    return ranges.split(pending, room)[0] if room and len(pending) else ranges.empty()


class Clock:
    """Context manager around the work: calls `drain` when time or money is up; `reached` then names the limit.

    Where it is up before the work begins, `reached` says so at once.
    """

    def __init__(self, job: Job, holders: Iterable[Holder], drain: Callable[[], None]) -> None:
        after_s, self._limit = min(_stops(job, spent(holders)), default=(threading.TIMEOUT_MAX, ""))
        self.reached: str | None = self._limit if after_s <= 0 else None
        self._drain = drain
        self._timer = threading.Timer(min(max(after_s, 0), threading.TIMEOUT_MAX), self._ring)
        self._timer.daemon = True

    def __enter__(self) -> "Clock":
        if self._limit:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._limit:
            self._timer.join()

    def _ring(self) -> None:
        self.reached = self._limit
        self._drain()


def _stops(job: Job, already_spent: float) -> list[tuple[float, str]]:
    """Return in how many seconds each limit is reached, and its name."""
    stops = []
    if job.limits.finish_by is not None:
        stops.append((_seconds_until(job.limits.finish_by), "finish_by"))
    if job.limits.max_cost is not None:
        stops.append(((job.limits.max_cost - already_spent) / hourly_cost(job) * _HOUR_S, "max_cost"))
    return stops


def _seconds_until(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp() - time.time()
