"""The speed of a job over its runs, as SVG markup: images/s in equal stretches of time, pauses between runs cut out."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np
import numpy.typing as npt

from jobs.progress import duration
from pipeline import ranges
from pipeline.commit import Commit
from pipeline.lease import Holder

_BARS = 60
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 220, 60, 16, 40
Floats = npt.NDArray[np.float64]


def throughput(commits: Sequence[Commit], runs: Sequence[Holder]) -> str:
    """Return the plot: when the rows of each file were first written, against the time that runs took."""
    times = np.array([commit.committed_at for commit in commits])
    rows = np.array([ranges.count(commit.rows) for commit in commits], np.float64)
    worked, starts = working_time(times, [run.started_at for run in runs])
    total = max(float(worked.max()), 1e-3)
    bars, edges = np.histogram(worked, _BARS, (0.0, total), weights=rows)
    speeds = bars / (edges[1] - edges[0])
    rate, top = rows.sum() / total, float(speeds.max())
    text = f"{rows.sum():,.0f} rows in {len(starts)} runs of {duration(total)} together: {rate:,.2f} images/s"
    plot = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(text)}">'
    return f"<p>{escape(text)}</p>{plot}{_bars(speeds, top)}{_runs(starts, total)}{_axes(top, total, times)}</svg>"


def working_time(times: Floats, started: Sequence[float]) -> tuple[Floats, list[float]]:
    """Return how long runs had worked when each file came, and when each run began on that clock.

    A run lasts from its start to its last file; one without files takes no time.
    """
    bounds = np.array(sorted({min([*started, times.min()]), *(at for at in started if at <= times.max())}))
    run = np.searchsorted(bounds, times, side="right") - 1
    lasted = np.array([(times[run == index] - at).max(initial=0.0) for index, at in enumerate(bounds)])
    before = np.concatenate([[0.0], np.cumsum(lasted)[:-1]])
    return times - bounds[run] + before[run], before[lasted > 0].tolist() or [0.0]


def _bars(speeds: Floats, top: float) -> str:
    width = (_WIDTH - _LEFT) / len(speeds)
    heights = speeds / max(top, 1e-9) * (_HEIGHT - _TOP - _BOTTOM)
    return "".join(
        f'<rect x="{_LEFT + index * width:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" width="{width - 1:.1f}" '
        f'height="{height:.1f}"><title>{speed:,.2f} images/s</title></rect>'
        for index, (speed, height) in enumerate(zip(speeds.tolist(), heights.tolist(), strict=True))
        if speed > 0
    )


def _runs(starts: Sequence[float], total: float) -> str:
    """A dashed line where a later run begins."""
    places = [_LEFT + at / total * (_WIDTH - _LEFT) for at in starts[1:]]
    return "".join(
        f'<line class="run" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>' for x in places
    )


def _axes(top: float, total: float, times: Floats) -> str:
    base = _HEIGHT - _BOTTOM
    first, last = (datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC") for at in (times.min(), times.max()))
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{base}" y2="{base}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{top:,.1f}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{base + 16}">0</text>'
        f'<text x="{_WIDTH}" y="{base + 16}" text-anchor="end">{duration(total)}</text>'
        f'<text x="{_LEFT}" y="{base + 32}">images/s over working time; first file {first}, last {last}</text>'
    )
