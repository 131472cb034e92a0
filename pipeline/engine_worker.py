"""One engine in one process, for batch rows and for online requests alike.

The actors of a job's own pool and the replicas of an endpoint hold this same class.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.endpoint.client import EngineRequest, EngineStatus, EngineUnavailable, Event, Finished, Refused, TokenOut
from pipeline.errors import RowError
from pipeline.generate import Answer, Pending, RowRefused
from pipeline.job import EngineOptions, Job, Model, Task
from smolvlm.image import Tiles

if TYPE_CHECKING:
    from smolvlm import Engine
    from smolvlm.engine import Completion, Token


_PATIENCE_S = 0.01  # for which a token, but the first, waits for company: a message costs a millisecond on either side


@dataclass(frozen=True)
class Row:
    """One prompt of a batch job about one image."""

    tiles: Tiles
    task: Task
    seed: int


def make_engine(model: Model, options: EngineOptions) -> "Engine":
    """Make the engine that a job asks for, on a GPU if it asks for one, else on the CPU.

    Raises:
        ValueError: the checkpoint does not load, or this device cannot do what is asked of it.
    """
    from smolvlm import Engine

    return Engine.from_pretrained(
        model.id,
        "cuda" if options.gpus else "cpu",
        model.dtype,
        model.revision,
        max_num_sequences=options.max_num_sequences,
        quantization=model.quantization,
        kv_cache_dtype=model.kv_cache_dtype,
    )


class EngineWorker:
    """The engine of `smolvlm`: `submit` and `answer` for batch rows, `stream` for online requests, which go first."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        # Imported here, in the actor: nobody else needs torch.
        import torch

        from smolvlm import Processor
        from smolvlm.engine import EngineLoop

        if not options.gpus:
            # Ray tells libraries to use as many threads as an actor reserves CPUs, here a fraction; the job decides.
            torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // options.replicas[0]))
        self._model = model
        self._processor = Processor.from_pretrained(model.id, revision=model.revision)
        self._loop = EngineLoop(make_engine(model, options))
        self._online_requests = self._batch_rows = 0

    @classmethod
    def for_job(cls, job: Job) -> "EngineWorker":
        """Make the worker of a job's own pool."""
        return cls(job.model, job.engine)

    @property
    def is_alive(self) -> bool:
        """Whether the engine works."""
        return self._loop.is_alive

    def submit(self, tiles: Tiles, task: Task, seed: int) -> Pending:
        """Queue one row; raises RowRefused for one that can never run."""
        future = self._queue(Row(tiles, task, seed))
        return lambda: self._answer(future.result())

    async def answer(self, rows: Sequence[Row]) -> list[Answer | RowError]:
        """Answer rows of a batch job. Raises EngineUnavailable if the engine dies; cancelling ends what is left."""
        return list(await asyncio.gather(*map(self._answer_row, rows)))

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        """Answer an online request. Raises EngineUnavailable if the engine dies; closing it ends the answers."""
        from smolvlm.engine import PromptTooLong

        mailbox = _Mailbox()
        futures: list[Future[Completion]] = []
        self._online_requests += 1
        try:
            futures += [self._start(request, choice, mailbox) for choice in range(request.n)]
            unfinished, patience_s = request.n, 0.0
            while unfinished:
                events = await mailbox.take(patience_s)
                unfinished -= sum(isinstance(event, Finished) for event in events)
                patience_s = _PATIENCE_S
                yield events
        except PromptTooLong:
            yield [Refused("context_length_exceeded")]
        finally:
            for future in futures:
                future.cancel()

    async def complete(self, request: EngineRequest) -> list[Event]:
        """The same, when all of it is there. Raises EngineUnavailable if the engine dies; cancelling it ends it."""
        async with aclosing(self.stream(request)) as batches:
            return [event async for events in batches for event in events]

    def status(self, actor_id: str) -> EngineStatus:
        """Say what the engine is doing."""
        stats = self._loop.stats()
        figures = {**asdict(stats), "occupancy": stats.occupancy, "kv_use": stats.used_blocks / stats.num_blocks}
        return EngineStatus(actor_id, os.getpid(), self._model, figures, self._online_requests, self._batch_rows)

    def close(self) -> None:
        """Stop the engine's thread, dropping what is unfinished."""
        self._loop.close(cancel=True)

    def _queue(self, row: Row) -> "Future[Completion]":
        """Queue the task's prompt with the image first, as the checkpoints were trained."""
        from smolvlm import SamplingParams
        from smolvlm.engine import BATCH, PromptTooLong

        content = [{"type": "image"}, {"type": "text", "text": row.task.prompt}]
        model_input = self._processor.from_tiles([{"role": "user", "content": content}], [row.tiles])
        task = row.task
        params = SamplingParams(
            max_new_tokens=task.max_new_tokens, temperature=task.temperature, top_p=task.top_p, seed=row.seed
        )
        self._batch_rows += 1
        try:
            return self._loop.submit(model_input, params, BATCH)
        except PromptTooLong as error:
            raise RowRefused("prompt_too_long", str(error)) from error

    async def _answer_row(self, row: Row) -> Answer | RowError:
        from smolvlm.engine import EngineDied

        try:
            return self._answer(await asyncio.wrap_future(self._queue(row)))
        except RowRefused as refused:
            return RowError(refused.code, "generate", str(refused))
        except EngineDied as error:
            raise EngineUnavailable(str(error)) from None

    def _answer(self, done: "Completion") -> Answer:
        text = self._processor.decode(done.token_ids).strip()  # the first token carries a space of its own
        return Answer(text, done.finish_reason, done.prompt_tokens, len(done.token_ids), done.mean_logprob)

    def _start(self, request: EngineRequest, choice: int, mailbox: "_Mailbox") -> "Future[Completion]":
        from smolvlm import SamplingParams
        from smolvlm.engine import ONLINE, EngineDied

        params = SamplingParams(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=None if request.seed is None else request.seed + choice,
            top_logprobs=request.top_logprobs,
        )

        clock = _Clock()

        def on_token(token: "Token") -> None:
            clock.note_token()
            mailbox.put(TokenOut(choice, token.token_id, token.logprob, token.top))

        try:
            future = self._loop.submit(request.model_input, params, ONLINE, on_token)
        except EngineDied as error:
            raise EngineUnavailable(str(error)) from None
        future.add_done_callback(lambda done: mailbox.put(_ended(choice, done, clock)))
        return future


class _Clock:
    """How long an answer takes, and its first token."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.first_token_s = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def note_token(self) -> None:
        self.first_token_s = self.first_token_s or self.seconds


def _ended(choice: int, done: "Future[Completion]", clock: _Clock) -> Finished | EngineUnavailable:
    if done.cancelled():
        return EngineUnavailable("the answer was cancelled")
    error = done.exception()
    if error is not None:
        return EngineUnavailable(str(error))
    completion = done.result()
    return Finished(choice, completion.finish_reason, clock.first_token_s, clock.seconds, completion.cached_tokens)


class _Mailbox:
    """Events on their way from the engine's thread to one coroutine, which is woken once for all that came meanwhile:
    a wake-up for every token would keep the process busy with nothing else."""

    def __init__(self) -> None:
        self._events: deque[Event | EngineUnavailable] = deque()
        self._loop = asyncio.get_running_loop()
        self._ready, self._over = asyncio.Event(), asyncio.Event()
        self._is_woken = False

    def put(self, event: Event | EngineUnavailable) -> None:
        """Add an event, from any thread."""
        self._events.append(event)
        if not isinstance(event, TokenOut):
            self._loop.call_soon_threadsafe(self._over.set)
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self, patience_s: float) -> list[Event]:
        """Wait for an event, then `patience_s` for others unless an answer is over, and return all there are.

        Raises EngineUnavailable where one of them says so.
        """
        while not self._events:  # a wake-up may come for an event that was taken with those before it
            await self._ready.wait()
            self._ready.clear()
            self._is_woken = False
        if patience_s:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), patience_s)
        self._over.clear()
        taken: list[Any] = [self._events.popleft() for _ in range(len(self._events))]
        failed = next((event for event in taken if isinstance(event, EngineUnavailable)), None)
        if failed is not None:
            raise failed
        return taken
