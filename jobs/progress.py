"""What a run shows while it goes on: a live line on a terminal, one JSON object a line anywhere else."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from pipeline.progress import Progress
    from pipeline.run import Summary

_LINE_PERIOD_S = 5.0


class Display(Protocol):
    """Shows a run's progress; made by `display`."""

    def __call__(self, progress: "Progress") -> None:
        """Show one state of the run."""

    def say(self, message: str) -> None:
        """Show a message to the user."""


@contextmanager
def display(stream: TextIO) -> Iterator[Display]:
    """Yield a live display if `stream` is a terminal, else one that writes JSON lines."""
    if not stream.isatty():
        lines = LineDisplay(stream)
        yield lines
        lines.flush()
        return
    with Bar(*_columns(), console=Console(file=stream)) as bar:
        yield BarDisplay(bar)


class LineDisplay:
    """One JSON object a line: the first state, then one every five seconds, and the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_s = 0.0
        self._held: Progress | None = None

    def __call__(self, progress: "Progress") -> None:
        """Write the state, or hold it until five seconds have passed."""
        self._held = progress
        if time.monotonic() - self._last_s >= _LINE_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        """Write the state held back, if any."""
        if self._held is not None:
            self._write({"event": "progress", **asdict(self._held)})
            self._held, self._last_s = None, time.monotonic()

    def say(self, message: str) -> None:
        """Write a message as an object of its own."""
        self._write({"event": "message", "message": message})

    def _write(self, content: Mapping[str, Any]) -> None:
        print(json.dumps(content), file=self._stream, flush=True)


class BarDisplay:
    """A progress bar with counts, rates, errors and the time left."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("listing", total=None, rates="", errors="", left="")

    def __call__(self, progress: "Progress") -> None:
        """Redraw."""
        self._bar.update(
            self._task,
            description="images",
            total=progress.total,
            completed=progress.done,
            rates=f"{progress.images_per_s:,.1f} images/s  {progress.tokens_per_s:,.0f} tokens/s",
            errors=f"[red]{progress.error:,} errors[/]" if progress.error else "0 errors",
            left=f"{duration(progress.eta_s)} left" if progress.eta_s is not None else "",
        )

    def say(self, message: str) -> None:
        """Print above the bar."""
        self._bar.console.print(message, markup=False, highlight=False)


def summary_object(summary: "Summary") -> dict[str, Any]:
    """Return the last object of a run."""
    return {"event": "summary", **asdict(summary)}


def summary_text(summary: "Summary") -> str:
    """Return the last lines of a run for a person."""
    state = "stopped early; run the same job again to finish it" if summary.interrupted else "finished"
    if summary.stopped_by:
        state = f"stopped at limits.{summary.stopped_by}; raise it and run the same job again to go on"
    lines = [
        f"{state}: {summary.rows:,} rows of {summary.inputs:,} images ({summary.ok:,} ok, {summary.error:,} errors)",
        f"{summary.images_per_s:,.2f} images/s, {summary.output_tokens:,} tokens in {duration(summary.elapsed_s)}",
    ]
    if summary.resumed_rows:
        lines.append(f"{summary.resumed_rows:,} rows were there from an earlier run")
    if summary.errors_by_code:
        lines.append("errors: " + ", ".join(f"{code} {count:,}" for code, count in summary.errors_by_code.items()))
    return "\n".join([*lines, f"output: {summary.output_uri}"])


def _columns() -> tuple[Any, ...]:
    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("rates", "errors", "left")]
    return (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
