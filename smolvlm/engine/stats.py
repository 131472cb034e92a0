"""What an engine is doing, in numbers: for metrics and health checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm.engine.sequence import ONLINE, Sequence

if TYPE_CHECKING:
    from smolvlm.engine.engine import Engine


@dataclass(frozen=True)
class ClassStats:
    """Sequences of one class: waiting for memory, admitted (being encoded and prefilled), running (decoding)."""

    waiting: int
    admitted: int
    running: int


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. `max_num_sequences` is what both classes may fill together; the counters from `steps` on only grow.
    `cached_tokens` of the `prompt_tokens` were taken over from earlier prompts (prefix caching).

    Taken while the engine works, from any thread and without stopping it: each number is right, but one may be a step
    ahead of another.
    """

    alive: bool
    online: ClassStats
    batch: ClassStats
    max_num_sequences: int
    num_blocks: int
    used_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int

    @property
    def occupancy(self) -> float:
        """Share of the decode batch that is filled, 0 to 1."""
        return (self.online.running + self.batch.running) / self.max_num_sequences

    @property
    def num_waiting(self) -> int:
        return self.online.waiting + self.batch.waiting


@dataclass
class Counters:
    """What an engine has done since it was made; written by its own thread alone."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


def snapshot(engine: Engine, alive: bool, inbox: Iterable[Sequence]) -> EngineStats:
    """The numbers of an engine; `inbox` are sequences that it has not been given yet."""
    scheduler, counters = engine.scheduler, engine.counters
    waiting = [*inbox, *scheduler.waiting.online, *scheduler.waiting.batch]
    queues = [_by_class(queue) for queue in (waiting, scheduler.admitted, scheduler.running)]
    return EngineStats(
        alive=alive,
        online=ClassStats(*(online for online, _ in queues)),
        batch=ClassStats(*(batch for _, batch in queues)),
        max_num_sequences=scheduler.limits.max_num_sequences + scheduler.limits.online_sequences,
        num_blocks=scheduler.blocks.num_blocks,
        used_blocks=scheduler.blocks.num_blocks - scheduler.blocks.num_free,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        cached_tokens=counters.cached_tokens,
        generated_tokens=counters.generated_tokens,
    )


def _by_class(sequences: Iterable[Sequence]) -> tuple[int, int]:
    priorities = [sequence.priority for sequence in list(sequences)]
    online = sum(priority >= ONLINE for priority in priorities)
    return online, len(priorities) - online
