"""A stand-in for the engine: its text is a function of the pixels, so a wrong, lost or doubled image shows."""

import hashlib
import os
import time
from pathlib import Path

from pipeline.generate import Answer, Pending, RowRefused
from pipeline.job import Job, Task
from smolvlm.image import Tiles


def text_of(tiles: Tiles, task: Task, seed: int) -> str:
    """Return what the stand-in answers."""
    digest = hashlib.sha256(tiles.pixels.tobytes()).hexdigest()[:16]
    sampled = f" {seed % 1000}" if task.temperature else ""
    return f"{task.prompt} {tiles.rows}x{tiles.cols} {digest}{sampled}"


class PixelAnswerer:
    """Answers after `delay_s`, noting every answer as a byte in `log`; refuses dark images if its prompt says so.

    Once the log is as long as the file `limit` says, it waits until that says more: however slow the machine is, a run
    gets no further than a test has allowed.
    """

    def __init__(self, job: Job, delay_s: float = 0.0, log: Path | None = None, limit: Path | None = None) -> None:
        self._delay_s = delay_s
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._limit = limit

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        if task.prompt == "refuse dark images" and tiles.pixels.mean() < 10:
            raise RowRefused("prompt_too_long", "too dark")
        text = text_of(tiles, task, seed)

        def wait() -> Answer:
            if self._delay_s:
                time.sleep(self._delay_s)
            if self._log is not None:
                while self._limit is not None and os.fstat(self._log).st_size >= int(self._limit.read_text()):
                    time.sleep(0.02)
                os.write(self._log, b".")
            return Answer(text, "stop", len(tiles.pixels), len(text), 0.0)

        return wait

    def close(self) -> None:
        pass


def set_limit(limit: Path, answers: int) -> None:
    """Let the stand-in engines give so many answers in all."""
    new = limit.with_suffix(".new")
    new.write_text(str(answers))
    new.replace(limit)  # at once: they read it all the time
