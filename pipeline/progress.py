"""A thread that looks at the board while the dataset runs: progress one way, the wish to drain the other."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pipeline.control import Control
from pipeline.finish import errors_by_code

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `done` rows have an answer, `committed` ones are in Parquet; rates are of this run."""

    total: int
    done: int
    committed: int
    ok: int
    error: int
    errors_by_code: dict[str, int]
    tokens: int
    elapsed_s: float
    images_per_s: float
    tokens_per_s: float
    eta_s: float | None


class ProgressReporter:
    """Context manager around the run: calls `on_progress` twice a second and once at the end."""

    def __init__(
        self,
        control: Control,
        total: int,
        resumed: int,
        on_progress: Callable[[Progress], None] | None,
        drain: threading.Event | None,
    ) -> None:
        self._control = control
        self._total = total
        self._resumed = resumed
        self._on_progress = on_progress
        self._drain = drain
        self._first_row_at: float | None = None
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "ProgressReporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            if self._drain is not None and self._drain.is_set():
                self._control.drain()
            self._look()

    def _look(self) -> None:
        if self._on_progress is None:
            return
        counts = self._control.counts()
        elapsed = time.monotonic() - self._started
        rows, committed = counts["generated"], counts["ok"] + counts["error"]
        rate = rows / elapsed
        left = self._total - self._resumed - rows
        self._on_progress(
            Progress(
                total=self._total,
                done=self._resumed + rows,
                committed=self._resumed + committed,
                ok=counts["ok"],
                error=counts["error"],
                errors_by_code=errors_by_code(counts),
                tokens=counts["tokens"],
                elapsed_s=elapsed,
                images_per_s=rate,
                tokens_per_s=counts["tokens"] / elapsed,
                eta_s=left / rate if rows else None,
            )
        )
