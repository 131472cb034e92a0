"""Jobs that send their rows to the endpoint's engines (`engine: {mode: shared}`), where online requests go first.

Rows travel in micro-batches, since each call costs a millisecond or two. A micro-batch whose engine is lost goes to
another one: an answer is a function of the row and its seed, so the second is the first. If that dies too, one of the
rows may be why, and the stage goes on as with an engine of its own that died (`pipeline.generate`).
"""

import threading
import time
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from pipeline.endpoint.client import EngineStatus, EngineUnavailable
from pipeline.engine_worker import Row
from pipeline.errors import ConfigError, PipelineError, RowError
from pipeline.generate import Answer, Pending, RowRefused
from pipeline.job import Job, Task
from pipeline.serve import LOST, engines_handle
from smolvlm.image import Tiles

ROWS_PER_CALL = 8
MAX_ATTEMPTS = 10
MAX_DEATHS = 2
_STATUS_TIMEOUT_S = 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


def check_endpoint(job: Job) -> int:
    """Return how many sequences the endpoint's engines decode together.

    Raises ConfigError unless an endpoint with the job's model runs on this cluster.
    """
    remedy = "start one with `smolvlm serve` on the same cluster, or set engine.mode to dedicated"
    try:
        statuses: list[EngineStatus] = engines_handle().broadcast("status").results(timeout_s=_STATUS_TIMEOUT_S)
    except (RayServeException, RayError, TimeoutError):
        statuses = []
    if not statuses:
        raise ConfigError(f"engine.mode is shared, but no endpoint answers on this cluster; {remedy}")
    served = statuses[0].model
    if served != job.model:
        raise ConfigError(
            f"engine.mode is shared, but the endpoint serves {served}, not {job.model}; set `model` to that, or "
            f"{remedy}"
        )
    return sum(int(status.stats["max_num_sequences"]) for status in statuses)


class SharedAnswerer:
    """The stage's small interface in front of the endpoint's engines. Every thread fills a micro-batch of its own."""

    def __init__(self, job: Job) -> None:
        self._engines = engines_handle()
        self._open = threading.local()

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        """Add a prompt to the thread's micro-batch. All tasks on one image travel together, so that it travels once."""
        call: _Call | None = getattr(self._open, "call", None)
        if call is None or call.is_sent or (call.is_full and call.rows[-1].tiles is not tiles):
            if call is not None:
                call.send()
            call = self._open.call = _Call(self._engines)
        return call.add(Row(tiles, task, seed))

    def close(self) -> None:
        """Nothing to stop: the engines are not this job's."""


class _Call:
    """One micro-batch: collected, sent, and sent again while engines are lost under it."""

    def __init__(self, engines: "DeploymentHandle[Any]") -> None:
        self.rows: list[Row] = []
        self._engines = engines
        self._response: DeploymentResponse[list[Answer | RowError]] | None = None
        self._answers: list[Answer | RowError] | None = None

    @property
    def is_sent(self) -> bool:
        return self._response is not None

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= ROWS_PER_CALL

    def add(self, row: Row) -> Pending:
        place = len(self.rows)
        self.rows.append(row)
        return lambda: self._answer(place)

    def send(self) -> None:
        if self._response is None:
            response: Any = self._engines.answer.remote(self.rows)
            self._response = response

    def _answer(self, place: int) -> Answer:
        if self._answers is None:
            self._answers = self._wait()
            self.rows = []  # the tiles are needed no more
        answer = self._answers[place]
        if isinstance(answer, RowError):
            raise RowRefused(answer.code, answer.message)
        return answer

    def _wait(self) -> list[Answer | RowError]:
        """Raises what the second engine died of, PipelineError where there is none for long."""
        wait_s, deaths = _FIRST_WAIT_S, 0
        for _ in range(MAX_ATTEMPTS):
            self.send()
            assert self._response is not None
            try:
                return self._response.result()
            except LOST as error:
                lost = error
            deaths += isinstance(lost, (RayActorError, EngineUnavailable))
            if deaths == MAX_DEATHS:
                raise lost
            self._response = None
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        raise PipelineError(f"no engine of the endpoint took the rows in {MAX_ATTEMPTS} attempts: {lost}")
