"""The two worker stages without a cluster: what goes in, what comes out, and what must be gone by then."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from standin import PixelAnswerer, text_of

from pipeline.control import Board, Control, Work
from pipeline.generate import Answer, GenerateWorker, Pending, RowRefused, tiles_of
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.manifest import load_manifest, read_rows, write_manifest
from pipeline.prepare import PrepareWorker
from pipeline.ranges import of_rows
from pipeline.records import PREPARED_SCHEMA, output_schema
from pipeline.source import manifest_tables
from pipeline.storage import Location
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, Tiles, decode_image, split_image

CONFIG = ImageConfig(tile_size=32, longest_edge=64, do_image_splitting=True, mean=(0.5,) * 3, std=(0.5,) * 3)
TASKS = (Task("caption", "Describe."), Task("ocr", "refuse dark images"), Task("mood", "Mood?", temperature=0.5))


class Tally(Control):
    """Counts on a board without an actor."""

    def __init__(self) -> None:
        self.board = Board()
        super().__init__(self.board)
        self.draining = False

    @property
    def totals(self) -> Counter[str]:
        return Counter(self.board.counts())

    def add(self, pool: str | None, **counts: int) -> None:
        self.board.add(pool, counts)

    def take(self, work: Work, lives: int) -> bool:
        return self.board.take(work, lives)

    def finish(self, work: Work, pool: str | None, **counts: int) -> None:
        self.board.finish(work, pool, counts)

    def enlist(self, pool: str, max_size: int) -> None:
        assert (pool, max_size) in {("prepare", 2), ("generate", 1)}

    def is_draining(self) -> bool:
        return self.draining


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def images(tmp_path: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    found: dict[str, bytes] = {}
    for i in range(6):
        target = io.BytesIO()
        Image.fromarray(rng.integers(60, 256, (20 + 9 * i, 70 - 8 * i, 3), np.uint8)).save(target, "PNG")
        found[f"{i}.png"] = target.getvalue()
    dark = io.BytesIO()
    Image.new("RGB", (30, 30)).save(dark, "PNG")
    found |= {"6-dark.png": dark.getvalue(), "7-cut.png": found["1.png"][:90], "8-empty.png": b""}
    (tmp_path / "in").mkdir()
    for name, data in found.items():
        (tmp_path / "in" / name).write_bytes(data)
    return found


@pytest.fixture
def job(tmp_path: Path, images: dict[str, bytes]) -> Job:
    return Job(
        "x",
        Source(str(tmp_path / "in")),
        Output(str(tmp_path / "out")),
        Model("none"),
        TASKS,
        image=ImageOptions(upscale=False),
        engine=EngineOptions(),
    )


@pytest.fixture
def block(job: Job) -> pa.Table:
    """All inputs as one block of manifest rows, and one that is gone by the time it is read."""
    destination = Location(job.output.uri)
    manifest = write_manifest(destination, manifest_tables(job.source))
    assert load_manifest(destination) == manifest
    return pa.concat_tables(read_rows(destination, manifest, of_rows(range(manifest.rows))))


@pytest.fixture
def worker(job: Job, tally: Tally) -> Iterator[PrepareWorker]:
    worker = PrepareWorker(job, CONFIG, tally, max_workers=2)
    yield worker
    worker._decoder.close()


def own_tiles(data: bytes) -> Tiles:
    return split_image(decode_image(data).image, CONFIG, ImagePolicy(upscale=False))


def test_after_prepare_the_compressed_bytes_are_gone(
    worker: PrepareWorker, block: pa.Table, images: dict[str, bytes], tally: Tally
) -> None:
    table = worker(block)
    assert table.schema == PREPARED_SCHEMA
    assert [
        field.name for field in table.schema if pa.types.is_large_binary(field.type) or pa.types.is_binary(field.type)
    ] == ["tiles"]
    raw = b"".join(buffer.to_pybytes() for column in table.columns for buffer in column.chunk(0).buffers() if buffer)
    assert not any(data[:60] in raw for data in images.values() if data)
    names = [Path(uri).name for uri in table["uri"].to_pylist()]
    assert names == sorted(images)
    for index, name in enumerate(names[:7]):
        found, expected = tiles_of(table, index), own_tiles(images[name])
        assert (found.rows, found.cols) == (expected.rows, expected.cols)
        assert np.array_equal(found.pixels, expected.pixels)
    assert [e and e["code"] for e in table["error"].to_pylist()] == [None] * 7 + ["truncated", "empty"]
    assert tally.totals["compressed_bytes"] == sum(map(len, images.values()))
    assert tally.totals["tile_bytes"] == sum(own_tiles(images[name]).pixels.nbytes for name in names[:7])


def test_tiles_are_views_of_the_block(worker: PrepareWorker, block: pa.Table) -> None:
    table = worker(block)
    buffer = table["tiles"].chunk(0).buffers()[2]
    for index in range(7):
        address = tiles_of(table, index).pixels.__array_interface__["data"][0]
        assert buffer.address <= address < buffer.address + buffer.size


def test_sliced_and_chunked_blocks_keep_their_tiles(worker: PrepareWorker, block: pa.Table) -> None:
    table = worker(block)
    again = pa.concat_tables([table.slice(4, 3), table.slice(0, 2)])
    for index, source in enumerate([4, 5, 6, 0, 1]):
        assert np.array_equal(tiles_of(again, index).pixels, tiles_of(table, source).pixels)


def test_a_draining_worker_takes_nothing(worker: PrepareWorker, block: pa.Table, tally: Tally) -> None:
    tally.draining = True
    assert worker(block) == PREPARED_SCHEMA.empty_table()
    tally.draining = False
    assert worker(block.slice(0, 0)) == PREPARED_SCHEMA.empty_table()
    assert not tally.totals


def test_what_fails_before_decoding_is_a_row_too(worker: PrepareWorker, block: pa.Table, job: Job) -> None:
    Path(job.source.uri, "2.png").unlink()
    table = worker(block)
    assert table["error"][2].as_py()["code"] == "not_found"
    assert table["num_tiles"][2].as_py() is None
    assert [i for i, error in enumerate(table["error"].to_pylist()) if error] == [2, 7, 8]


def test_after_generate_the_tiles_are_gone(
    worker: PrepareWorker, block: pa.Table, job: Job, images: dict[str, bytes], tally: Tally
) -> None:
    table = GenerateWorker(job, PixelAnswerer, tally)(worker(block))
    assert table.schema == output_schema(TASKS)
    assert not {"tiles", "grid_rows", "grid_cols"} & set(table.schema.names)
    assert table.nbytes < 10_000
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["error"] * 3
    assert [row["error"] and row["error"]["code"] for row in rows[6:]] == ["prompt_too_long", "truncated", "empty"]
    for row in rows[:7]:
        tiles = own_tiles(images[Path(row["uri"]).name])
        assert row["caption"]["text"] == text_of(tiles, TASKS[0], 0)
        assert row["num_tiles"] == len(tiles.pixels) == row["caption"]["prompt_tokens"]
    assert rows[6]["ocr"] is None  # the refused task; the others answered
    assert rows[6]["mood"] is not None
    assert [rows[7][task.name] for task in TASKS] == [None] * 3
    assert tally.totals["generated"] == 9
    assert tally.totals["tokens"] == sum(row[t.name]["output_tokens"] for row in rows for t in TASKS if row[t.name])


def test_sampled_text_follows_the_row_not_its_block(
    worker: PrepareWorker, block: pa.Table, job: Job, tally: Tally
) -> None:
    prepared = worker(block)
    generate = GenerateWorker(job, PixelAnswerer, tally)
    whole = generate(prepared)["mood"].to_pylist()
    parts = [generate(prepared.slice(i, n))["mood"].to_pylist() for i, n in ((0, 2), (2, 5), (7, 2))]
    assert [answer for part in parts for answer in part] == whole
    other = GenerateWorker(replace(job, seed=1), PixelAnswerer, tally)(prepared)["mood"].to_pylist()
    assert sum(a != b for a, b in zip(whole[:7], other[:7], strict=True)) >= 6
    assert len({answer["text"].rpartition(" ")[2] for answer in whole[:7]}) >= 6  # and each row has its own seed


def test_an_empty_block_passes(job: Job, tally: Tally) -> None:
    generate = GenerateWorker(job, PixelAnswerer, tally)
    assert generate(PREPARED_SCHEMA.empty_table()) == output_schema(TASKS).empty_table()


class Dying(PixelAnswerer):
    """An engine that breaks on its third answer."""

    answered = 0

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        if task.name == "refused":
            raise RowRefused("prompt_too_long", "no")

        def wait() -> Answer:
            type(self).answered += 1
            if type(self).answered == 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return Answer("x", "stop", 1, 1, 0.0)

        return wait


def test_a_broken_engine_ends_its_process_and_answers_nothing(
    worker: PrepareWorker, block: pa.Table, job: Job, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit_now(code: int) -> Any:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", exit_now)
    generate = GenerateWorker(replace(job, tasks=TASKS[:1]), Dying, tally)
    prepared = worker(block)
    with pytest.raises(SystemExit, match="1"):
        generate(prepared)
    assert tally.totals["generated"] == 0


def test_the_real_engine_refuses_a_prompt_beyond_its_context(tiny_checkpoint: Path, job: Job) -> None:
    from pipeline.engine_worker import EngineWorker

    config = ImageConfig.from_pretrained(tiny_checkpoint)
    real = replace(job, model=Model(str(tiny_checkpoint), dtype="float32"), engine=EngineOptions(threads=1))
    answerer = EngineWorker.for_job(real)
    tiles = split_image(Image.new("RGB", (40, 30), "white"), config)
    with pytest.raises(RowRefused) as caught:
        answerer.submit(tiles, Task("long", "word " * 100_000), 0)
    assert caught.value.code == "prompt_too_long"
    answer = answerer.submit(tiles, Task("short", "Describe.", max_new_tokens=3), 0)()
    assert 1 <= answer.output_tokens <= 3
    answerer.close()
