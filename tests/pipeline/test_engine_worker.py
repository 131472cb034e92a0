"""The worker that batch jobs and the endpoint share: same answers either way, and what it does when the engine dies."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from pipeline.endpoint.client import EngineRequest, EngineUnavailable, Event, Finished, Refused, TokenOut
from pipeline.engine_worker import EngineWorker, Row
from pipeline.errors import RowError
from pipeline.generate import Answer
from pipeline.job import EngineOptions, Model, Task
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput, Processor

TASK = Task("caption", "What is it?", max_new_tokens=10)


@pytest.fixture(scope="module")
def worker(tiny_checkpoint: Path) -> Iterator[EngineWorker]:
    worker = EngineWorker(Model(str(tiny_checkpoint), dtype="float32"), EngineOptions(threads=1))
    yield worker
    worker.close()


@pytest.fixture
def mortal(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineWorker]:
    """A worker whose engine breaks at its twentieth step."""
    worker = EngineWorker(Model(str(tiny_checkpoint), dtype="float32"), EngineOptions(threads=1))
    original, steps = worker._loop.engine.step, 0

    def step() -> object:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original()

    monkeypatch.setattr(worker._loop.engine, "step", step)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_pretrained(tiny_checkpoint)


def tiles(seed: int = 0) -> Tiles:
    return Tiles(np.random.default_rng(seed).integers(0, 256, (1, 32, 32, 3), np.uint8), 0, 0)


def question(processor: Processor, seed: int = 0) -> ModelInput:
    content = [{"type": "image"}, {"type": "text", "text": TASK.prompt}]
    return processor.from_tiles([{"role": "user", "content": content}], [tiles(seed)])


async def events(worker: EngineWorker, request: EngineRequest) -> list[Event]:
    return [event async for several in worker.stream(request) for event in several]


def test_a_row_and_a_request_get_the_same_answer(worker: EngineWorker, processor: Processor) -> None:
    (row,) = asyncio.run(worker.answer([Row(tiles(), TASK, 0)]))
    found = asyncio.run(events(worker, EngineRequest(question(processor), 10)))
    assert isinstance(row, Answer)
    assert worker.submit(tiles(), TASK, 0)() == row
    assert processor.decode([event.token_id for event in found if isinstance(event, TokenOut)]).strip() == row.text
    assert isinstance(found[-1], Finished)
    assert found[-1].reason == row.finish_reason
    assert 0 < found[-1].first_token_s <= found[-1].engine_s
    whole = asyncio.run(worker.complete(EngineRequest(question(processor), 10)))
    assert [event[:2] for event in whole] == [event[:2] for event in found]


def test_choices_have_seeds_of_their_own(worker: EngineWorker, processor: Processor) -> None:
    def answers(seed: int | None, n: int) -> list[list[int]]:
        request = EngineRequest(question(processor), 10, n=n, temperature=1.5, seed=seed, top_logprobs=2)
        found = asyncio.run(events(worker, request))
        assert sorted(event.choice for event in found if isinstance(event, Finished)) == list(range(n))
        assert all(len(event.top) == 2 for event in found if isinstance(event, TokenOut))
        return [[e.token_id for e in found if isinstance(e, TokenOut) and e.choice == c] for c in range(n)]

    together = answers(7, 4)
    assert together == [answers(7 + choice, 1)[0] for choice in range(4)]
    assert len({tuple(answer) for answer in together}) == 4
    assert answers(None, 1) != answers(None, 1)


def test_a_prompt_beyond_the_context_is_refused(worker: EngineWorker, processor: Processor) -> None:
    long = processor.from_tiles([{"role": "user", "content": "word " * 3000}], [])
    assert asyncio.run(events(worker, EngineRequest(long, 10))) == [Refused("context_length_exceeded")]
    refused, answered = asyncio.run(
        worker.answer([Row(tiles(), Task("long", "word " * 3000), 0), Row(tiles(), TASK, 0)])
    )
    assert isinstance(refused, RowError)
    assert (refused.code, refused.stage) == ("prompt_too_long", "generate")
    assert isinstance(answered, Answer)


def test_closing_the_stream_ends_the_answers(worker: EngineWorker, processor: Processor) -> None:
    async def leave() -> None:
        request = EngineRequest(question(processor), 1900, n=3, temperature=1.0)
        async with aclosing(worker.stream(request)) as stream:
            await anext(stream)
        while worker.status("x").stats["online"]["running"]:
            await asyncio.sleep(0.005)

    before = worker.status("x").stats["generated_tokens"]
    asyncio.run(asyncio.wait_for(leave(), 60))
    assert worker.status("x").stats["generated_tokens"] - before < 3 * 1900


def test_status_counts_both_kinds(worker: EngineWorker, processor: Processor) -> None:
    before = worker.status("me")
    asyncio.run(worker.answer([Row(tiles(n), TASK, 0) for n in range(3)]))
    asyncio.run(events(worker, EngineRequest(question(processor), 3)))
    after = worker.status("me")
    assert (after.batch_rows - before.batch_rows, after.online_requests - before.online_requests) == (3, 1)
    assert after.actor_id == "me"
    assert 0 <= after.stats["kv_use"] <= 1


def test_a_dying_engine_is_told_to_everyone(mortal: EngineWorker, processor: Processor) -> None:
    async def both() -> Sequence[object]:
        request = EngineRequest(question(processor), 200)
        calls = (events(mortal, request), mortal.answer([Row(tiles(), Task("t", "?", max_new_tokens=200), 0)]))
        return await asyncio.gather(*calls, return_exceptions=True)

    was_alive = mortal.is_alive
    for outcome in asyncio.run(both()):
        assert isinstance(outcome, EngineUnavailable)
    assert (was_alive, mortal.is_alive) == (True, False)
    with pytest.raises(EngineUnavailable):
        asyncio.run(events(mortal, EngineRequest(question(processor), 3)))
    with pytest.raises(EngineUnavailable):
        asyncio.run(mortal.answer([Row(tiles(), TASK, 0)]))
