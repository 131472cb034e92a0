"""One request inside the engine: the only mutable object that travels between scheduler and runner."""

from __future__ import annotations

import enum
import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from smolvlm.engine.images import EncodedImage
from smolvlm.engine.prefix import BlockKeys
from smolvlm.image import Tiles
from smolvlm.sampling import SamplingParams, is_repeating

FinishReason = Literal["stop", "length", "repetition", "aborted"]

BATCH = 0  # fills what is left
ONLINE = 1  # somebody waits for it

_ids = itertools.count()


class Status(enum.Enum):
    """waiting (no memory yet) → admitted (pages reserved; images, then prompt) → running (decoding) → finished."""

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
    under the model, 0.0 where there is none (aborted before the first token); `cached_tokens` of the prompt were
    computed for an earlier sequence. Log-probabilities of single tokens are not kept: whoever wants them listens.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    mean_logprob: float
    cached_tokens: int = field(default=0, compare=False)


@dataclass(eq=False)
class Sequence:
    """A prompt, its answer so far, and the memory that it holds. Only the engine changes it.

    `tile_ends` says for each of `images` where in the prompt the tokens of its tiles end; both lose an image once no
    token of it is missing. `keys` name the blocks that it fills, None where it shares none. Of the prompt,
    `num_computed` tokens are in the cache, `num_cached` of them taken over from others; the piece under way ends at
    `num_scheduled`.
    """

    prompt_token_ids: list[int]
    tiles: list[Tiles]
    params: SamplingParams
    priority: int
    max_new_tokens: int
    on_token: OnToken | None = None
    tile_ends: list[list[int]] = field(default_factory=list)
    keys: BlockKeys | None = None
    id: int = field(default_factory=lambda: next(_ids))
    status: Status = Status.WAITING
    images: list[EncodedImage] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # what `on_token` raised

    def __post_init__(self) -> None:
        self.is_online = self.priority >= ONLINE
        self.random = random.Random(self.params.seed)
        if not self.tile_ends:
            self.tile_ends = [[len(self.prompt_token_ids)] * len(tiles.pixels) for tiles in self.tiles]

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
        return all(image.is_encoded_from(first) for image, first in self.needed_tiles())

    @property
    def last_batch(self) -> int:
        """Number of the encoder batch after which all that it needs is there, 0 where it needs none."""
        return max((image.last_batch(first) for image, first in self.needed_tiles()), default=0)

    @property
    def num_missing(self) -> int:
        """Prompt tokens that are still to be computed."""
        return len(self.prompt_token_ids) - self.num_computed

    def needed_tiles(self) -> Iterator[tuple[EncodedImage, int]]:
        """Its images, each with the first tile that has tokens to be computed."""
        return self.tiles_behind(self.num_computed)

    def tiles_behind(self, num_tokens: int) -> Iterator[tuple[EncodedImage, int]]:
        """Its images, each with the first tile that has tokens behind the first `num_tokens`."""
        for image, ends in zip(self.images, self.tile_ends, strict=True):
            yield image, bisect_right(ends, num_tokens)

    def missing_keys(self) -> Iterator[bytes]:
        """Keys of the prompt's blocks that it could take over from another sequence instead of computing them.

        The one with the last prompt token is not among them: the answer starts from that token's logits.
        """
        if self.keys is not None:
            size = self.keys.block_size
            for index in range(self.num_computed // size, (len(self.prompt_token_ids) - 1) // size):
                yield self.keys[index]

    def take_over(self, num_blocks: int) -> None:
        """The first `num_blocks` of its missing ones are computed: somebody else did."""
        if num_blocks:
            assert self.keys is not None, "blocks are found by keys"
            size = self.keys.block_size
            before, self.num_computed = self.num_computed, (self.num_computed // size + num_blocks) * size
            self.num_cached += self.num_computed - before

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
        prompt_tokens = len(self.prompt_token_ids)
        return Completion(self.token_ids, self.finish_reason, prompt_tokens, count, mean, self.num_cached)

    def _reason_to_stop(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        params = self.params
        if not params.ignore_eos and token_id in eos_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_new_tokens:
            return "length"
        window = None if params.ignore_eos else params.repetition_window
        return "repetition" if window is not None and is_repeating(self.token_ids, window) else None
