import io
import json
import time
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from jobs import progress as module
from jobs.progress import BarDisplay, LineDisplay, display, summary_object, summary_text
from pipeline.progress import Progress
from pipeline.run import Summary


def state(done: int = 3, **changes: Any) -> Progress:
    values: dict[str, Any] = {
        "total": 10,
        "done": done,
        "committed": 2,
        "ok": 2,
        "error": 0,
        "errors_by_code": {},
        "tokens": 1234,
        "elapsed_s": 2.0,
        "images_per_s": 1.5,
        "tokens_per_s": 617.0,
        "eta_s": 75.4,
    }
    return Progress(**{**values, **changes})


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "inputs": 10,
        "rows": 10,
        "ok": 8,
        "error": 2,
        "errors_by_code": {"truncated": 2},
        "resumed_rows": 4,
        "output_tokens": 1234,
        "compressed_bytes": 1,
        "tile_bytes": 1,
        "elapsed_s": 3700.0,
        "images_per_s": 0.25,
        "interrupted": False,
        "stopped_by": None,
        "output_uri": "s3://bucket/out",
    }
    return Summary(**{**values, **changes})


def test_lines_are_spaced_and_the_last_state_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with display(stream) as shown:
        for second in range(5):
            clock[0] = 100.0 + 2.5 * second
            shown(state(done=second))
        shown.say("stopping")
        shown(state(done=5))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("done", line.get("message")) for line in lines] == [0, 2, 4, "stopping", 5]
    assert lines[0] == {"event": "progress", **vars(state(done=0))}


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    with display(io.StringIO()) as shown:
        assert isinstance(shown, LineDisplay)


def test_a_terminal_gets_counts_rates_errors_and_the_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with Bar(*module._columns(), console=console) as bar:
        shown = BarDisplay(bar)
        shown(state(error=2))
        shown.say("stopping [soon]")
        bar.refresh()
    text = stream.getvalue()
    for part in ("3/10", "1.5 images/s", "617 tokens/s", "2 errors", "1 min 15 s left", "stopping [soon]"):
        assert part in text


def test_the_summary_for_people_and_for_programs() -> None:
    assert summary_object(summary()) == {"event": "summary", **vars(summary())}
    assert summary_text(summary()).splitlines() == [
        "finished: 10 rows of 10 images (8 ok, 2 errors)",
        "0.25 images/s, 1,234 tokens in 1 h 01 min",
        "4 rows were there from an earlier run",
        "errors: truncated 2",
        "output: s3://bucket/out",
    ]
    assert "stopped early" in summary_text(summary(interrupted=True))
    assert "stopped at limits.max_cost; raise it" in summary_text(summary(stopped_by="max_cost"))
