"""Images that end the engine's process: each becomes one error row, and no other row is lost, doubled or changed."""

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from driver import make_job
from noise import write_noise
from PIL import Image
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from standin import PixelAnswerer, text_of

from jobs.verify import verify
from pipeline import shared
from pipeline.control import Board
from pipeline.errors import PipelineError
from pipeline.generate import MAX_LIVES, Answer, Pending, _Turns
from pipeline.job import Job, Task
from pipeline.run import run
from pipeline.shared import SharedAnswerer
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, Tiles, decode_image, split_image

NUM_IMAGES = 96
ENGINES = DeploymentID("engines")
POISON = ("0007.png", "0040.png", "0041.png")


class Mortal(PixelAnswerer):
    """Ends its process at a black image. Every process leaves a byte in `lives`."""

    def __init__(self, job: Job, lives: Path) -> None:
        super().__init__(job)
        with lives.open("ab") as file:
            file.write(b".")

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        pending = super().submit(tiles, task, seed)

        def wait() -> Answer:
            if not tiles.pixels.any():
                os._exit(7)
            return pending()

        return wait


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    write_noise(folder, NUM_IMAGES)
    for name in POISON:
        Image.new("RGB", (30, 20)).save(folder / name)
    return folder


@pytest.mark.timeout(900)
def test_deadly_images_become_error_rows_and_the_job_goes_on(
    images: Path, tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str
) -> None:
    job = make_job(str(images), str(tmp_path / "out"), str(tiny_checkpoint))
    done = run(job, answerer_factory=partial(Mortal, lives=tmp_path / "lives"))
    assert (done.inputs, done.ok, done.errors_by_code) == (NUM_IMAGES, NUM_IMAGES - 3, {"engine_died": 3})
    rows = {Path(row["uri"]).name: row for row in pq.read_table(tmp_path / "out" / "data").to_pylist()}
    config = ImageConfig.from_pretrained(tiny_checkpoint)
    for path in sorted(images.iterdir()):
        if path.name in POISON:
            error = rows[path.name]["error"]
            assert (error["stage"], error["attempts"], rows[path.name]["caption"]) == ("generate", MAX_LIVES, None)
            assert "engines died with this image" in error["message"]
        else:
            tiles = split_image(decode_image(path.read_bytes()).image, config, ImagePolicy())
            assert rows[path.name]["caption"]["text"] == text_of(tiles, job.tasks[0], 0)
    assert verify(job.output.uri).passed
    assert 1 + MAX_LIVES <= (tmp_path / "lives").stat().st_size <= 1 + len(POISON) * MAX_LIVES


def test_the_board_gives_work_out_as_often_as_it_may_fail() -> None:
    board, first, second = Board(), ("block", 0, 0), ("block", 0, 12)
    assert [board.take(first, 2) for _ in range(4)] == [True, True, False, False]
    assert [board.take(first, 3) for _ in range(2)] == [True, False]
    assert board.take(second, 1)
    board.finish(first, "generate", {"generated": 12})
    assert board.take(first, 1)
    assert not board.take(second, 1)
    assert board.counts() == {"generated": 12}


def test_deaths_are_forgiven_where_something_got_done() -> None:
    board = Board()
    assert [board.started("generate") for _ in range(3)] == [1, 2, 3]
    board.add("prepare", {"tile_bytes": 9})
    board.add(None, {"generated": 1})
    assert board.started("generate") == 4
    board.finish(("row", 0, 3), "generate", {})
    assert board.started("generate") == 1


def test_who_is_alone_has_nobody_beside_it() -> None:
    turns, inside, seen = _Turns(), list[str](), list[list[str]]()

    def enter(kind: str) -> None:
        with turns.alone() if kind == "alone" else turns.shared():
            inside.append(kind)
            time.sleep(0.002)
            seen.append(list(inside))
            inside.remove(kind)

    threads = [threading.Thread(target=enter, args=("alone" if n % 4 == 0 else "shared",)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert [each for each in seen if "alone" in each] == [["alone"]] * 10
    assert inside == []


class Handle:
    """The endpoint's engines, each call to which ends as the list says."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.answer = list(outcomes), self
        self.calls = 0

    def remote(self, rows: Any) -> "Handle":
        self.calls += 1
        return self

    def result(self) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def asked(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> Answer:
    monkeypatch.setattr(shared, "engines_handle", lambda: handle)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answerer = SharedAnswerer(make_job("in", "out", "checkpoint"))
    return answerer.submit(Tiles(np.zeros((1, 4, 4, 3), np.uint8), 0, 0), Task("caption", "?"), 0)()


def test_a_call_is_sent_again_once_when_its_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, death = Answer("x", "stop", 1, 1, 0.0), RayActorError()
    gone = [DeploymentUnavailableError(ENGINES)] * 3
    handle = Handle(*gone, death, *gone, [answer])
    assert asked(handle, monkeypatch) == answer
    assert handle.calls == 8
    with pytest.raises(RayActorError):
        asked(Handle(death, *gone, death, [answer]), monkeypatch)


def test_an_endpoint_that_is_gone_ends_the_run_and_blames_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [DeploymentUnavailableError(ENGINES)] * shared.MAX_ATTEMPTS
    with pytest.raises(PipelineError, match="no engine of the endpoint took the rows in 10 attempts"):
        asked(Handle(*gone), monkeypatch)
