"""What the gateway asks of the engines, and what they answer: plain values, so that it never needs torch."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pipeline.job import Model
from smolvlm.processor import ModelInput


@dataclass(frozen=True)
class EngineRequest:
    """One prompt, to be answered `n` times. With a seed, answer `i` has the seed `seed + i`.

    `is_streamed` False: nobody looks at the answer before it is whole, so that its events may come all at once.
    """

    model_input: ModelInput
    max_new_tokens: int
    is_streamed: bool = True
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0


class TokenOut(NamedTuple):
    """The next token of answer `choice`."""

    choice: int
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Finished(NamedTuple):
    """Answer `choice` has ended. Seconds count from when the engine got it; `cached_tokens` of its prompt were there
    already."""

    choice: int
    reason: str
    first_token_s: float
    engine_s: float
    cached_tokens: int


class Refused(NamedTuple):
    """The engine does not take the prompt."""

    code: str


Event = TokenOut | Finished | Refused


@dataclass(frozen=True)
class EngineStatus:
    """One engine: who it is, what it runs, what it is doing (`smolvlm.engine.EngineStats` as a mapping)."""

    actor_id: str
    pid: int
    model: Model
    stats: dict[str, Any]
    online_requests: int
    batch_rows: int


class EngineUnavailable(Exception):
    """No engine can answer now, or the one that was answering is gone."""


class EngineClient(Protocol):
    """The engines as the gateway sees them."""

    def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        """Give events as they come, several at a time; closing it ends the answers. Raises EngineUnavailable."""

    async def statuses(self) -> list[EngineStatus]:
        """Ask every engine that answers. Raises EngineUnavailable if none does."""
