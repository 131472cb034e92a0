"""What the driver and its workers tell each other during a run: counts one way, "stop taking new work" the other."""

import time
from collections import Counter
from typing import Any

import ray
from ray.util.metrics import Counter as Metric
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError

_ASK_AGAIN_S = 0.5
MAX_DEATHS_IN_A_ROW = 10


class Board:
    """The state, in an actor of its own."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._draining = False
        self._starts: Counter[str] = Counter()
        self._metrics: dict[str, Metric] = {}

    def add(self, counts: dict[str, int]) -> None:
        """Add to the counts: the run gets on, so earlier deaths of workers are forgiven."""
        self._counts.update(counts)
        self._starts.clear()
        for name, count in counts.items():
            if count:
                self._export(name, count)

    def started(self, pool: str) -> int:
        """Count a worker's start and return how many of its pool have started since the run last got on."""
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

    def add(self, **counts: int) -> None:
        """Add to the counts without waiting."""
        self._board.add.remote(counts)

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
