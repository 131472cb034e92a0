"""How a side of `benchmarks/captions.py` takes its turns: one line on stdin asks for a run, one on stdout answers.

Only the standard library: a peer runs in an environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Caption = Callable[[list[Path], int], list[int]]
"""Pictures and tokens per answer → number of tokens of each answer."""


def take_turns(prepare: Callable[[dict[str, Any]], Caption]) -> None:
    """Load what the work file names; answer `{"pictures": n, "tokens": m}` with `{"seconds": s, "tokens": [...]}`."""
    answers = _own_stdout()
    work: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    pictures = [Path(each) for each in work["pictures"]]
    caption = prepare(work)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        started = time.perf_counter()
        tokens = caption(pictures[: turn["pictures"]], turn["tokens"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


def _own_stdout() -> Any:
    """Keep stdout for the answers: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
