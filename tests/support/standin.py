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
    """Answers after `delay_s`, noting every answer as a byte in `log`; refuses dark images if its prompt says so."""

    def __init__(self, job: Job, delay_s: float = 0.0, log: Path | None = None) -> None:
        self._delay_s = delay_s
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        if task.prompt == "refuse dark images" and tiles.pixels.mean() < 10:
            raise RowRefused("prompt_too_long", "too dark")
        text = text_of(tiles, task, seed)

        def wait() -> Answer:
            if self._delay_s:
                time.sleep(self._delay_s)
            if self._log is not None:
                os.write(self._log, b".")
            return Answer(text, "stop", len(tiles.pixels), len(text), 0.0)

        return wait

    def close(self) -> None:
        pass
