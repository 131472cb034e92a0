"""The decode step over buffers that stay where they are, so that a CUDA graph can replay it.

A batch fills the rows of a bucket: the next size up that there is a step for. Rows without a sequence stand at position
0 of a block that belongs to nobody and stay there. A sequence keeps its row while it is decoded, and only the rows of
those that join or leave are written from the host: the step itself brings tokens and positions forward.

So the host need not see a token before the next step: a visit runs several steps, and the next visit is under way
before the tokens of this one are read. What comes out for a sequence after its end is thrown away. It changes nothing:
it is written behind the sequence's last token, into pages that are its own until whoever gets them next, later in the
order of the device, writes them anew.

Nothing here is special to CUDA: with a capture that gives the step back as it is, it runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smolvlm.attention import Attention, KVCache
from smolvlm.config import ModelConfig
from smolvlm.engine.chosen import Chosen, read_answers, read_tokens
from smolvlm.engine.sequence import Sequence
from smolvlm.engine.upload import fetch, send
from smolvlm.sampling import SamplingTensors

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # may run the step, on padding, before it gives back one that does the same
DecodeAttention = Callable[[Tensor, Tensor, KVCache], Attention]  # of positions [B], block table [B, N] and a cache

COARSE = 64  # buckets are powers of two up to here, multiples of it above
STEPS = 8  # of one visit
ONLINE_STEPS = 2  # while somebody waits for the tokens


class StepModel(Protocol):
    """What a step computes with."""

    config: ModelConfig

    def embed(self, token_ids: Tensor) -> Tensor: ...

    def __call__(self, embeddings: Tensor, attention: Attention) -> Tensor: ...

    def choose(
        self, logits: Tensor, sampling: SamplingTensors | None, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def bucket_size(batch: int) -> int:
    """Rows of the bucket for a batch: up to 64 the next power of two, above it the next multiple of 64."""
    return 1 << (batch - 1).bit_length() if batch <= COARSE else -(-batch // COARSE) * COARSE


class Bucket:
    """The buffers of one bucket and who sits in which row.

    `cursor` int64 [4, R]: last token, its position, by how much a step moves it (0 in padding), the last position that
    it may take. `table` int64 [R, N]: block tables. `settings` float32 [R, 3]: temperature, top_p, whether greedy.
    `turn` int64 [1] counts the steps of a visit; `uniform` float32 [STEPS, R, 1] are the random numbers of each, and
    `chosen` float32 [STEPS, 2, R] what they chose. `logits` [R, V] are what the last step left.
    """

    def __init__(self, rows: int, pages: int, scratch: int, drawn: bool, device: torch.device) -> None:
        self.drawn = drawn  # whether some row may be other than greedy
        self.scratch = scratch
        self.cursor = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.table = torch.full((rows, pages), scratch, dtype=torch.int64, device=device)
        self.settings = torch.ones(rows, 3, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(STEPS, rows, 1, device=device)
        self.chosen = torch.zeros(STEPS, 2, rows, device=device)
        self.logits = torch.empty(0, device=device)
        self.step: Step
        self._seats: list[int | None] = [None] * rows  # ids of sequences

    def seat(self, sequences: list[Sequence]) -> list[int]:
        """Rows of these sequences. Those without one get one; rows whose sequence has gone become padding."""
        ids = {sequence.id for sequence in sequences}
        free = [row for row, seated in enumerate(self._seats) if seated not in ids]
        seated = set(self._seats)
        joining = [sequence for sequence in sequences if sequence.id not in seated]
        left = [row for row in free[len(joining) :] if self._seats[row] is not None]
        if joining or left:
            self._write(joining, free[: len(joining)] + left)
        rows = {seated: row for row, seated in enumerate(self._seats)}
        return [rows[sequence.id] for sequence in sequences]

    def clear(self) -> None:
        """Make all rows padding: who sat here went on in another bucket."""
        self._seats = [None] * len(self._seats)
        self.cursor.zero_()
        self.table.fill_(self.scratch)

    def shuffle(self, sequences: list[Sequence], rows: list[int], steps: int) -> None:
        """Take the next random numbers of each sequence."""
        numbers = np.zeros(tuple(self.uniform.shape), dtype=np.float32)
        for row, sequence in zip(rows, sequences, strict=True):
            numbers[:steps, row, 0] = [sequence.random.random() for _ in range(steps)]
        self.uniform.copy_(send(numbers, self.uniform.device))

    @property
    def sampling(self) -> SamplingTensors | None:
        if not self.drawn:
            return None
        return SamplingTensors(self.settings[:, 0:1], self.settings[:, 1:2], self.settings[:, 2:3] > 0)

    def _write(self, joining: list[Sequence], rows: list[int]) -> None:
        """Put `joining` into the first of these rows and padding into the rest."""
        cursor = np.zeros((4, len(rows)), dtype=np.int64)
        table = np.full((len(rows), self.table.shape[1]), self.scratch)
        settings = np.ones((len(rows), 3), dtype=np.float32)
        for index, sequence in enumerate(joining):
            params = sequence.params
            cursor[:, index] = sequence.token_ids[-1], sequence.num_tokens - 1, 1, sequence.max_tokens - 1
            table[index, : len(sequence.block_table)] = sequence.block_table
            if not params.is_greedy:
                settings[index] = params.temperature, params.top_p, 0
        places = send(np.array(rows), self.table.device)
        for buffer, values, dim in ((self.cursor, cursor, 1), (self.table, table, 0), (self.settings, settings, 0)):
            buffer.index_copy_(dim, places, send(values, places.device))
        for index, row in enumerate(rows):
            self._seats[row] = joining[index].id if index < len(joining) else None


@dataclass(frozen=True)
class Visit:
    """Some steps of a bucket, under way."""

    bucket: Bucket
    sequences: list[Sequence]
    rows: dict[int, int]  # by Sequence.id
    steps: int
    read: Callable[[], Tensor]  # waits for `chosen` [steps, 2, R]

    def tokens(self, sequences: list[Sequence]) -> Chosen:
        """What it chose for these; nothing for those that were not part of it."""
        chosen = self.read()
        if any(sequence.params.top_logprobs for sequence in self.sequences):
            return self._with_alternatives(chosen, sequences)
        answers = read_answers(chosen)
        return [answers[self.rows[each.id]] if each.id in self.rows else [] for each in sequences]

    def _with_alternatives(self, chosen: Tensor, sequences: list[Sequence]) -> Chosen:
        assert self.steps == 1, "only the last step's logits are there"
        rows = [self.rows[sequence.id] for sequence in sequences]
        return read_tokens(chosen[0], self.bucket.logits, sequences, rows)

    def num_coming(self, sequence: Sequence) -> int:
        return self.steps if sequence.id in self.rows else 0


class StaticDecoder:
    """Decodes with one captured step per bucket, made when first needed.

    Batches with a sequence that is not greedy have steps of their own, which sort the vocabulary.
    """

    def __init__(
        self, model: StepModel, cache: KVCache, device: torch.device, attention: DecodeAttention, capture: Capture
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.attention = attention
        self.capture = capture
        self._num_pages = -(-model.config.text.max_positions // cache.block_size)
        self._buckets: dict[tuple[int, bool], Bucket] = {}
        self._last: Bucket | None = None
        self._ahead: Visit | None = None

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Chosen:
        """Choose the next tokens of each sequence: none for one that joins while a visit of the others is under way."""
        visit, self._ahead = self._ahead, None
        if visit is None or not any(sequence.id in visit.rows for sequence in sequences):
            visit = self._start(sequences, None)
        assert visit is not None, "a sequence that is decoded has tokens to come"
        self._ahead = self._start(sequences, visit)
        return visit.tokens(sequences)

    def _start(self, sequences: list[Sequence], before: Visit | None) -> Visit | None:
        """Begin the visit after `before`, whose tokens the host has not seen; None if there can or need be none."""
        bucket = self._bucket_for(sequences, before)
        missing = {each.id: _num_missing(each) - (before.num_coming(each) if before else 0) for each in sequences}
        going_on = [sequence for sequence in sequences if missing[sequence.id] > 0]
        if bucket is None or not going_on:
            return None
        steps = min(_most_steps(going_on), max(missing.values()))
        rows = bucket.seat(going_on)
        if bucket.drawn:
            bucket.shuffle(going_on, rows, steps)
        bucket.turn.zero_()
        for _ in range(steps):
            bucket.step()
        ids = (sequence.id for sequence in going_on)
        return Visit(bucket, going_on, dict(zip(ids, rows, strict=True)), steps, fetch(bucket.chosen[:steps]))

    def _bucket_for(self, sequences: list[Sequence], before: Visit | None) -> Bucket | None:
        """Their bucket; None where the host must see tokens first, to bring them into another or to list others."""
        drawn = not all(sequence.params.is_greedy for sequence in sequences)
        size = bucket_size(len(sequences)), drawn
        if before is None:
            return self._bucket(*size)
        lists = any(sequence.params.top_logprobs for sequence in (*before.sequences, *sequences))
        return None if lists or self._buckets.get(size) is not before.bucket else before.bucket

    def _bucket(self, rows: int, drawn: bool) -> Bucket:
        bucket = self._buckets.get((rows, drawn))
        if bucket is None:
            bucket = Bucket(rows, self._num_pages, self.cache.scratch, drawn, self.device)
            bucket.step = self.capture(partial(self._step, bucket))
            self._buckets[rows, drawn] = bucket
        if bucket is not self._last:
            bucket.clear()
        self._last = bucket
        return bucket

    def _step(self, bucket: Bucket) -> None:
        """One token for every row, all on the device: nothing here may depend on values that the host would read."""
        tokens, positions, advance, ends = bucket.cursor
        attention = self.attention(positions, bucket.table, self.cache)
        bucket.logits = self.model(self.model.embed(tokens), attention)
        uniform = bucket.uniform.index_select(0, bucket.turn).squeeze(0) if bucket.drawn else None
        chosen, logprobs = self.model.choose(bucket.logits, bucket.sampling, uniform)
        bucket.chosen.index_copy_(0, bucket.turn, torch.stack([chosen.float(), logprobs]).unsqueeze(0))
        tokens.copy_(chosen)
        torch.minimum(positions + advance, ends, out=positions)
        bucket.turn.add_(1).remainder_(STEPS)


def _num_missing(sequence: Sequence) -> int:
    return sequence.max_new_tokens - len(sequence.token_ids)


def _most_steps(sequences: list[Sequence]) -> int:
    if any(sequence.params.top_logprobs for sequence in sequences):
        return 1
    return ONLINE_STEPS if any(sequence.is_online for sequence in sequences) else STEPS
