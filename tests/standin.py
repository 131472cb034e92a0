"""A stand-in for the engine: its text is a function of the pixels, so a wrong, lost or doubled image shows."""

import hashlib
import os
import time

from pipeline.generate import Answer, Pending, RowRefused
from pipeline.job import Job, Task
from smolvlm.image import Tiles


def text_of(tiles: Tiles, task: Task, seed: int) -> str:
    """Return what the stand-in answers."""
    digest = hashlib.sha256(tiles.pixels.tobytes()).hexdigest()[:16]
    sampled = f" {seed % 1000}" if task.temperature else ""
    return f"{task.prompt} {tiles.rows}x{tiles.cols} {digest}{sampled}"


class PixelAnswerer:
    """Answers at once, or after STANDIN_DELAY_S seconds; refuses images darker than STANDIN_REFUSE_BELOW."""

    def __init__(self, job: Job) -> None:
        self._delay_s = float(os.environ.get("STANDIN_DELAY_S", "0"))

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        if task.prompt == "refuse dark images" and tiles.pixels.mean() < 10:
            raise RowRefused("prompt_too_long", "too dark")
        text = text_of(tiles, task, seed)

        def wait() -> Answer:
            time.sleep(self._delay_s)
            return Answer(text, "stop", len(tiles.pixels), len(text), 0.0)

        return wait

    def close(self) -> None:
        pass
