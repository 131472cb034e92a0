"""A thread that steps an engine, and futures for everyone else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self

from smolvlm.cpu.threads import release_threads
from smolvlm.engine.engine import Engine
from smolvlm.engine.sequence import BATCH, Completion, OnToken, Sequence, Token
from smolvlm.engine.stats import EngineStats, snapshot
from smolvlm.sampling import SamplingParams

if TYPE_CHECKING:
    from smolvlm.processor import ModelInput


class EngineDied(RuntimeError):
    """A step of the engine failed; what it was working on is lost, and the loop takes no more."""


class EngineLoop:
    """Runs an engine on a thread of its own; `submit` may be called from any thread, thousands of times.

    Cancelling a future aborts its sequence. As a context manager it finishes all work on a normal exit and drops it
    when the body raised.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Sequence, Future[Completion]]] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._pending: dict[int, tuple[Sequence, Future[Completion]]] = {}  # by Sequence.id; the thread's own
        self._closing = self._dropping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="smolvlm-engine", daemon=True)
        release_threads()  # who has loaded the engine computes no more
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def submit(
        self, model_input: ModelInput, params: SamplingParams, priority: int = BATCH, on_token: OnToken | None = None
    ) -> Future[Completion]:
        """Queue an input and return at once.

        `on_token` gets every token as it comes out, in order, on the engine's thread, and none once the future is done:
        it should only hand the token on, since all sequences wait for it. What it raises becomes the future's exception
        and ends this sequence; the others go on.

        Raises:
            ValueError: the input is refused (Engine.prepare).
            EngineDied: an earlier step failed.
            RuntimeError: the loop is closed.
        """
        future: Future[Completion] = Future()
        sequence = self.engine.prepare(model_input, params, priority, on_token and _until_done(future, on_token))
        future.add_done_callback(lambda done: self._note_cancelled(sequence) if done.cancelled() else None)
        with self._changed:
            self._refuse_if_over()
            self._inbox.append((sequence, future))
            self._changed.notify()
        return future

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes and does work: it is neither closed to the end nor broken."""
        return self._thread.is_alive() and self._error is None

    def stats(self) -> EngineStats:
        """What the engine is doing. Cheap, and safe from any thread."""
        with self._changed:
            inbox = [sequence for sequence, _ in self._inbox]
        return snapshot(self.engine, self.is_alive, inbox)

    def close(self, cancel: bool = False) -> None:
        """Stop taking inputs, finish the accepted ones (or cancel them), and end the thread. May be called twice."""
        with self._changed:
            self._closing = True
            self._dropping = self._dropping or cancel
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                for sequence in self.engine.step():
                    self._resolve(sequence)
        except BaseException as error:
            self._fail(error)

    def _take_in(self) -> bool:
        """Sleep until there is something to do, bring it to the engine; False once the loop is closed and done."""
        with self._changed:
            self._changed.wait_for(self._has_news)
            inbox, self._inbox = self._inbox, deque()
            cancelled, self._cancelled = self._cancelled, deque()
            closing, dropping = self._closing, self._dropping
        for sequence, future in inbox:
            self._pending[sequence.id] = (sequence, future)
            self.engine.enqueue(sequence)
        self._drop([sequence for sequence, _ in self._pending.values()] if dropping else cancelled)
        return self.engine.has_unfinished or not closing

    def _has_news(self) -> bool:
        return bool(self._inbox or self._cancelled or self._closing or self.engine.has_unfinished)

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abort(sequence)
            _, future = self._pending.pop(sequence.id, (None, None))
            if future is not None and future.cancel():
                future.set_running_or_notify_cancel()  # wakes those who wait for a cancelled future

    def _resolve(self, sequence: Sequence) -> None:
        _, future = self._pending.pop(sequence.id)
        if not future.set_running_or_notify_cancel():
            return
        if sequence.error is not None:
            future.set_exception(sequence.error)
        else:
            future.set_result(sequence.completion())

    def _fail(self, error: BaseException) -> None:
        """Refuse what comes from now on, then tell everyone who waits."""
        with self._changed:
            self._error = error
            waiting = [future for _, future in (*self._pending.values(), *self._inbox)]
            self._inbox.clear()
        self._pending.clear()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_died(error))

    def _note_cancelled(self, sequence: Sequence) -> None:
        with self._changed:
            self._cancelled.append(sequence)
            self._changed.notify()

    def _refuse_if_over(self) -> None:
        if self._error is not None:
            raise _died(self._error)
        if self._closing:
            raise RuntimeError("the EngineLoop is closed; submit before close(), or start another")


def _until_done(future: Future[Completion], on_token: OnToken) -> OnToken:
    def deliver(token: Token) -> None:
        if not future.done():
            on_token(token)

    return deliver


def _died(error: BaseException) -> EngineDied:
    """A fresh exception for each waiter: one object raised in several threads would mix their tracebacks."""
    died = EngineDied(f"the engine stopped: {type(error).__name__}: {error}")
    died.__cause__ = error
    return died
