"""How busy a run is over time, and how soon it is as busy again after a fault."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

WINDOW_S, BACK_AT = 5.0, 0.9
STANDS_STILL_S = 240.0


@dataclass
class Strike:
    """One fault: what, when, and when the capacity that it took was there again (seconds of the meter)."""

    kind: str
    at: float
    capacity_at: float


@dataclass
class Meter:
    """How many answers there were, twice a second; an answer is a byte in a file."""

    log: Path
    started: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    def watch(self, over: threading.Event) -> None:
        """Look until it is over."""
        while not over.wait(0.5):
            self.answers.append(self.log.stat().st_size if self.log.exists() else 0)
            self.times.append(self.now)

    def rate(self, start: float, stop: float) -> float:
        """Answers a second between two moments."""
        first, last = bisect_left(self.times, start), bisect_left(self.times, stop)
        if last >= len(self.times) or last <= first:
            return 0.0
        return (self.answers[last] - self.answers[first]) / (self.times[last] - self.times[first])

    def back_after(self, moment: float, steady: float) -> float | None:
        """Seconds from `moment` to the first window that is as busy as it was, None if there is none yet."""
        starts = self.times[bisect_left(self.times, moment) :]
        found = (each for each in starts if self.rate(each, each + WINDOW_S) >= BACK_AT * steady)
        start = next(found, None)
        return None if start is None else start - moment

    def check_moves(self) -> None:
        """Raise if there was no answer for a long time."""
        first = bisect_left(self.times, self.now - STANDS_STILL_S)
        if self.now > STANDS_STILL_S and self.answers[first:] and self.answers[first] == self.answers[-1]:
            raise RuntimeError(f"no answer for {STANDS_STILL_S:.0f} s: the run stands still")


@contextmanager
def watching(meter: Meter) -> Iterator[None]:
    """Count answers for the length of the block."""
    over = threading.Event()
    thread = threading.Thread(target=meter.watch, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def timeline(meter: Meter, strikes: list[Strike], step_s: float = 10.0) -> Table:
    """Return rows a second over time, and what struck when."""
    table = Table("seconds", "answers/s", "", "struck", title="faults")
    most = max((meter.rate(s, s + step_s) for s in np.arange(0, meter.now, step_s)), default=0.0) or 1.0
    for start in np.arange(0, meter.times[-1], step_s):
        rate = meter.rate(start, min(start + step_s, meter.times[-1] - 0.6))
        struck = Counter(each.kind for each in strikes if start <= each.at < start + step_s)
        words = ", ".join(f"{count} {kind}" for kind, count in struck.items())
        table.add_row(f"{start:.0f}", f"{rate:.0f}", "█" * round(30 * rate / most), words)
    return table
