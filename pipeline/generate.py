"""The GPU stage: tiles in, text out. An actor holds one engine; many blocks are in it at once, so its batch stays
full.

An image may end the engine's process, and all that is in flight with it. The board notes what a worker takes before it
does, so the next worker knows. A block that two engines died with gets one to itself. If that dies too, its rows get
one to themselves, one after the other, and a row that is alone in its engine at two deaths is an error row. What merely
shared an engine with it is answered on the way, and what a preempted node had in flight is not slowed down at all.
"""

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.control import Control, Work
from pipeline.errors import PipelineError, RowError
from pipeline.job import Job, Task
from pipeline.records import error_value, output_schema
from smolvlm.image import Tiles

SHARED_LIVES, BLOCK_LIVES, ROW_LIVES = 2, 1, 2
"""How many engines may die with a block among others, with it alone, and with one of its rows alone."""
MAX_LIVES = SHARED_LIVES + BLOCK_LIVES + ROW_LIVES


@dataclass(frozen=True)
class Answer:
    """What one task said about one image."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    mean_logprob: float


class RowRefused(ValueError):
    """The engine will not take this request; `code` goes into the row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Pending = Callable[[], Answer]
"""Waits for one answer and returns it."""


class Answerer(Protocol):
    """What the stage needs of an engine."""

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        """Queue one prompt about one image; it or what it returns raises RowRefused for one that can never run."""

    def close(self) -> None:
        """Stop."""


AnswererFactory = Callable[[Job], Answerer]


class GenerateWorker:
    """An actor of the generate pool. Ray calls it from several threads; each call waits for one block's answers."""

    def __init__(self, job: Job, factory: AnswererFactory, control: Control) -> None:
        control.enlist("generate", job.engine.replicas[1])
        self._job = job
        self._answerer = factory(job)
        self._control = control
        self._turns = _Turns()
        self._schema = output_schema(job.tasks)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's rows with the job's output schema, none of them while draining; the tiles end here."""
        if block.num_rows == 0 or self._control.is_draining():
            return self._schema.empty_table()
        return answered_table(block, self._answers(block), self._job.tasks)

    def _answers(self, block: pa.Table) -> list[list[Answer | RowError]]:
        work = _work("block", block)
        with self._turns.shared():
            if self._control.take(work, SHARED_LIVES):
                return self._together(block, work)
        with self._turns.alone():
            if self._control.take(work, SHARED_LIVES + BLOCK_LIVES):
                return self._together(block, work)
            return [self._alone(block.slice(index, 1)) for index in range(block.num_rows)]

    def _alone(self, row: pa.Table) -> list[Answer | RowError]:
        work = _work("row", row)
        if self._control.take(work, ROW_LIVES):
            return self._together(row, work)[0]
        self._control.add(None, generated=1)
        message = f"{MAX_LIVES} engines died with this image, the last {ROW_LIVES} with nothing else in them"
        return [RowError("engine_died", "generate", message, MAX_LIVES)] * len(self._job.tasks)

    def _together(self, block: pa.Table, work: Work) -> list[list[Answer | RowError]]:
        try:
            pending = [self._submit(block, index) for index in range(block.num_rows)]
            answers = [[_outcome(item) for item in row] for row in pending]
        except PipelineError:
            raise  # no engine's death: it ends the run
        except Exception as error:
            # The engine is gone, not the row: end this process, so that Ray starts another and sends the block again.
            print(f"engine failed: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        tokens = sum(answer.output_tokens for row in answers for answer in row if isinstance(answer, Answer))
        pool = "generate" if any(answers) else None
        self._control.finish(work, pool, generated=block.num_rows, tokens=tokens)
        return answers

    def _submit(self, block: pa.Table, index: int) -> list[Pending | RowError]:
        if block["error"][index].is_valid:
            return []
        tiles = tiles_of(block, index)
        seeds = [_seed(self._job.seed, block, index, task) for task in self._job.tasks]
        return [
            _submitted(self._answerer, tiles, task, seed) for task, seed in zip(self._job.tasks, seeds, strict=True)
        ]


class _Turns:
    """Many blocks in the engine at once, or one alone. Who waits to be alone lets nobody new in."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._left = threading.Condition()
        self._inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._door, self._left:
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._door:
            with self._left:
                self._left.wait_for(lambda: not self._inside)
            yield


def _work(kind: str, rows: pa.Table) -> Work:
    """A name for the rows that a second attempt has too: every row is in one block."""
    return kind, rows["shard_id"][0].as_py(), rows["row"][0].as_py()


def tiles_of(block: pa.Table, index: int) -> Tiles:
    """Return row `index`'s tiles, uint8 [num_tiles, S, S, 3], a view of the block's memory."""
    num_tiles = block["num_tiles"][index].as_py()
    # `block["tiles"][index].as_buffer()` would copy: a scalar owns its bytes.
    cell = next(chunk for chunk in block["tiles"].slice(index, 1).chunks if len(chunk))
    start, stop = np.frombuffer(cell.buffers()[1], dtype=np.int64)[cell.offset : cell.offset + 2].tolist()
    flat = np.frombuffer(cell.buffers()[2], dtype=np.uint8)[start:stop]
    side = math.isqrt(len(flat) // (3 * num_tiles))
    pixels = flat.reshape(num_tiles, side, side, 3)
    return Tiles(pixels=pixels, rows=block["grid_rows"][index].as_py(), cols=block["grid_cols"][index].as_py())


def answered_table(block: pa.Table, answers: list[list[Answer | RowError]], tasks: tuple[Task, ...]) -> pa.Table:
    """Return the output rows: a prepare error stands, else the first task's refusal, else `ok`."""
    errors = [_row_error(block["error"][index].as_py(), row) for index, row in enumerate(answers)]
    schema = output_schema(tasks)
    columns = {name: block[name] for name in schema.names if name in block.schema.names and name != "error"}
    columns["status"] = pa.array(["ok" if error is None else "error" for error in errors])
    columns["error"] = pa.array(errors, schema.field("error").type)
    for position, task in enumerate(tasks):
        values = [_answer_value(row[position]) if row else None for row in answers]
        columns[task.name] = pa.array(values, schema.field(task.name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _row_error(prepared: dict[str, Any] | None, answers: list[Answer | RowError]) -> dict[str, Any] | None:
    if prepared is not None:
        return prepared
    return error_value(next((answer for answer in answers if isinstance(answer, RowError)), None))


def _answer_value(answer: Answer | RowError) -> dict[str, Any] | None:
    return vars(answer) if isinstance(answer, Answer) else None


def _submitted(answerer: Answerer, tiles: Tiles, task: Task, seed: int) -> Pending | RowError:
    try:
        return answerer.submit(tiles, task, seed)
    except RowRefused as refused:
        return RowError(refused.code, "generate", str(refused))


def _outcome(pending: Pending | RowError) -> Answer | RowError:
    try:
        return pending if isinstance(pending, RowError) else pending()
    except RowRefused as refused:
        return RowError(refused.code, "generate", str(refused))


def _seed(job_seed: int, block: pa.Table, index: int, task: Task) -> int:
    """A number of the row's own, so that sampled text does not depend on batches, workers or retries."""
    key = f"{job_seed}/{block['shard_id'][index]}/{block['row'][index]}/{task.name}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
