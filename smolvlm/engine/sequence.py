"""One request inside the engine: the only mutable object that travels between scheduler and runner."""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from smolvlm.engine.images import EncodedImage
from smolvlm.image import Tiles
from smolvlm.sampling import SamplingParams, is_repeating

FinishReason = Literal["stop", "length", "repetition", "aborted"]

BATCH = 0  # fills what is left
ONLINE = 1  # somebody waits for it

_ids = itertools.count()


class Status(enum.Enum):
    """waiting (no memory yet) → admitted (pages reserved, images being encoded) → running (decoding) → finished."""

    WAITING = "waiting"
    ADMITTED = "admitted"
    RUNNING = "running"
    FINISHED = "finished"


class Token(NamedTuple):
    """One token of an answer as it comes out: its log-probability under the model, before temperature and top_p, and
    the `SamplingParams.top_logprobs` likeliest tokens in its place with theirs, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


OnToken = Callable[[Token], None]


@dataclass(frozen=True)
class Completion:
    """The answer to one input.

    `token_ids` includes the end token where there is one; `mean_logprob` is the mean log-probability of these tokens
    under the model, 0.0 where there is none (aborted before the first token).
    """

    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    mean_logprob: float


@dataclass(eq=False)
class Sequence:
    """A prompt, its answer so far, and the memory that it holds. Only the engine changes it."""

    prompt_token_ids: list[int]
    tiles: list[Tiles]
    params: SamplingParams
    priority: int
    max_new_tokens: int
    on_token: OnToken | None = None
    id: int = field(default_factory=lambda: next(_ids))
    status: Status = Status.WAITING
    images: list[EncodedImage] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # what `on_token` raised

    def __post_init__(self) -> None:
        self.random = random.Random(self.params.seed)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens it can come to, for which pages are reserved."""
        return len(self.prompt_token_ids) + self.max_new_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of all queues: higher priority first, then first come, first served."""
        return -self.priority, self.id

    @property
    def is_encoded(self) -> bool:
        return all(image.is_encoded for image in self.images)

    def append(self, token_id: int, logprob: float, eos_token_ids: frozenset[int]) -> None:
        """Take the next token of the answer and decide whether it is the last."""
        self.token_ids.append(token_id)
        self.logprob_sum += logprob
        self.finish_reason = self._reason_to_stop(token_id, eos_token_ids)

    def deliver(self, token: Token) -> None:
        """Hand a token to whoever listens; a listener that fails ends this sequence, and no other."""
        if self.on_token is None:
            return
        try:
            self.on_token(token)
        except Exception as error:
            self.error, self.finish_reason = error, "aborted"

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "a sequence has a completion once it is finished"
        count = len(self.token_ids)
        mean = self.logprob_sum / count if count else 0.0
        return Completion(self.token_ids, self.finish_reason, len(self.prompt_token_ids), count, mean)

    def _reason_to_stop(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        params = self.params
        if not params.ignore_eos and token_id in eos_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_new_tokens:
            return "length"
        window = None if params.ignore_eos else params.repetition_window
        return "repetition" if window is not None and is_repeating(self.token_ids, window) else None
