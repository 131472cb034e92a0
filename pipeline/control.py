"""What the driver and its workers tell each other during a run: counts and what is in flight one way, "stop taking new
work" the other."""

import time
from collections import Counter
from typing import Any

import ray
from ray.util.metrics import Counter as Metric
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError

_ASK_AGAIN_S = 0.5
MAX_DEATHS_IN_A_ROW = 10

Work = tuple[str, int, int]
"""What a worker has in flight, so that its death is known to concern it: a block or a row, by shard and row."""


class Board:
    """The state, in an actor of its own."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._draining = False
        self._starts: Counter[str] = Counter()
        self._begun: Counter[Work] = Counter()
        self._metrics: dict[str, Metric] = {}

    def take(self, work: Work, lives: int) -> bool:
        """Note that a worker begins with it; or return False, if `lives` workers have begun and never finished."""
        if self._begun[work] >= lives:
            return False
        self._begun[work] += 1
        return True

    def finish(self, work: Work, pool: str | None, counts: dict[str, int]) -> None:
        """Note that a worker is through with it, and add to the counts."""
        self._begun.pop(work, None)
        self.add(pool, counts)

    def add(self, pool: str | None, counts: dict[str, int]) -> None:
        """Add to the counts: this pool, if one, gets on, so earlier deaths of its workers are forgiven."""
        self._counts.update(counts)
        if pool is not None:
            self._starts.pop(pool, None)
        for name, count in counts.items():
            if count:
                self._export(name, count)

    def started(self, pool: str) -> int:
        """Count a worker's start and return how many of its pool have started since that last got on."""
        self._starts[pool] += 1
        return self._starts[pool]

    def counts(self) -> dict[str, int]:
        """Return all counts so far."""
        return dict(self._counts)

    def drain(self) -> None:
        """Ask the workers to take no new work."""
        self._draining = True

    def is_draining(self) -> bool:
        """Whether that was asked."""
        return self._draining

    def _export(self, name: str, count: int) -> None:
        """Count where Prometheus sees it: `ray_smolvlm_job_<name>_total`, errors by the label `code`."""
        kind, _, code = name.partition(".")
        metric = f"smolvlm_job_{'errors' if code else 'rows_' + kind if kind in ('ok', 'error') else kind}"
        if metric not in self._metrics:
            self._metrics[metric] = Metric(metric, f"{kind} of jobs", tag_keys=("code",) if code else ())
        self._metrics[metric].inc(count, tags={"code": code} if code else {})


class Control:
    """A handle on the board that travels to the workers. Counts are for showing; the rows in `data/` are the truth."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._draining = False
        self._asked_at = 0.0

    @classmethod
    def create(cls) -> "Control":
        """Start a board; it ends with the driver, and is on its node: others come and go with the load."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        return cls(ray.remote(Board).options(**options).remote())

    def add(self, pool: str | None, **counts: int) -> None:
        """Add to the counts without waiting. `pool` got something done: its deaths are forgiven; None: no pool did."""
        self._board.add.remote(pool, counts)

    def take(self, work: Work, lives: int) -> bool:
        """Note that work begins, and wait until that is noted: it may end this process. Returns False, and notes
        nothing, if `lives` processes have ended since they took it."""
        return bool(ray.get(self._board.take.remote(work, lives)))

    def finish(self, work: Work, pool: str | None, **counts: int) -> None:
        """Say without waiting that this process has outlived the work, and add to the counts."""
        self._board.finish.remote(work, pool, counts)

    def counts(self) -> Counter[str]:
        """Return the counts, waiting for them."""
        return Counter(ray.get(self._board.counts.remote()))

    def enlist(self, pool: str, max_size: int) -> None:
        """Say that a worker has started. Raises PipelineError if its kind keeps dying without getting anything done.

        Ray starts dead workers again without end; a worker that cannot live on this job has to stop it.
        """
        starts: int = ray.get(self._board.started.remote(pool))
        if starts > max_size + MAX_DEATHS_IN_A_ROW:
            raise PipelineError(
                f"{pool} workers died {MAX_DEATHS_IN_A_ROW} times in a row without finishing a row; their logs say why"
            )

    def drain(self) -> None:
        """Let what is in flight finish and start nothing new."""
        ray.get(self._board.drain.remote())

    def is_draining(self) -> bool:
        """Whether to skip new work; asks the board twice a second at most."""
        now = time.monotonic()
        if not self._draining and now - self._asked_at > _ASK_AGAIN_S:
            self._asked_at = now
            self._draining = bool(ray.get(self._board.is_draining.remote()))
        return self._draining
