"""What a training shows while it goes on: a live line on a terminal, one JSON object a line anywhere else."""

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from jobs.progress import duration
from smolvlm.training.loop import StepReport
from smolvlm.training.plan import TrainingPlan
from smolvlm.training.probe import Score

_LINE_PERIOD_S = 5.0
_STEPS_AVERAGED = 20


@dataclass(frozen=True)
class State:
    """Where a training stands. Losses are means of the last steps; `eta_s` is None before there is a speed."""

    step: int
    total_steps: int
    stage: str
    losses: dict[str, float]
    learning_rate: float
    samples_per_s: float | None
    eta_s: float | None
    score: dict[str, float] | None


class Meter:
    """Step reports → states: averages over the last steps, speed with everything in it, time left by examples."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._last: deque[tuple[float, StepReport]] = deque(maxlen=_STEPS_AVERAGED)
        self._score: Score | None = None

    def __call__(self, report: StepReport, score: Score | None) -> State:
        if self._last and self._last[-1][1].stage != report.stage:
            self._last.clear()
        self._last.append((time.monotonic(), report))
        self._score = score or self._score
        speed = self._samples_per_s()
        return State(
            step=report.step,
            total_steps=self._plan.total_steps,
            stage=report.stage,
            losses={name: self._mean(name) for name in report.losses},
            learning_rate=report.learning_rate,
            samples_per_s=speed,
            eta_s=None if speed is None else self._examples_left(report.step) / speed,
            score=None if self._score is None else asdict(self._score),
        )

    def _mean(self, name: str) -> float:
        values = [report.losses[name] for _, report in self._last]
        return sum(values) / len(values)

    def _samples_per_s(self) -> float | None:
        if len(self._last) < 2:
            return None
        examples = sum(report.examples for _, (_, report) in pairwise(self._last))
        return examples / max(self._last[-1][0] - self._last[0][0], 1e-9)

    def _examples_left(self, step: int) -> int:
        """Examples of the steps after the first `step`."""
        left, before = 0, 0
        for stage in self._plan.stages:
            left += stage.batch_size * max(0, min(stage.steps, before + stage.steps - step))
            before += stage.steps
        return left


class Display(Protocol):
    """Shows a training's progress; made by `display`."""

    def __call__(self, state: State) -> None:
        """Show one state."""

    def say(self, message: str) -> None:
        """Show a message to the user."""


@contextmanager
def display(stream: TextIO) -> Iterator[Display]:
    """Yield a live display if `stream` is a terminal, else one that writes JSON lines."""
    if not stream.isatty():
        yield LineDisplay(stream)
        return
    with Bar(*_columns(), console=Console(file=stream)) as bar:
        yield BarDisplay(bar)


class LineDisplay:
    """One JSON object a line: every five seconds, the last step, and every score."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_s = float("-inf")
        self._score: Mapping[str, float] | None = None

    def __call__(self, state: State) -> None:
        """Write the state, unless the last line is too recent and nothing new was measured."""
        if state.step == state.total_steps or state.score != self._score or self._is_due():
            self._last_s, self._score = time.monotonic(), state.score
            self._write({"event": "progress", **asdict(state)})

    def say(self, message: str) -> None:
        """Write a message as an object of its own."""
        self._write({"event": "message", "message": message})

    def _is_due(self) -> bool:
        return time.monotonic() - self._last_s >= _LINE_PERIOD_S

    def _write(self, content: Mapping[str, Any]) -> None:
        print(json.dumps(content), file=self._stream, flush=True)


class BarDisplay:
    """A progress bar with losses, rates, the last score and the time left."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("loading", total=None, losses="", rates="", score="", left="")

    def __call__(self, state: State) -> None:
        """Redraw."""
        speed = "" if state.samples_per_s is None else f"  {state.samples_per_s:,.1f} samples/s"
        self._bar.update(
            self._task,
            description=state.stage,
            total=state.total_steps,
            completed=state.step,
            losses="  ".join(f"{name} {value:.3f}" for name, value in state.losses.items()),
            rates=f"rate {state.learning_rate:.2g}{speed}",
            score="" if state.score is None else f"CER {state.score['cer']:.1%}",
            left="" if state.eta_s is None else f"{duration(state.eta_s)} left",
        )

    def say(self, message: str) -> None:
        """Print above the bar."""
        self._bar.console.print(message, markup=False, highlight=False)


def _columns() -> tuple[Any, ...]:
    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("losses", "rates", "score", "left")]
    return (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), *texts)
