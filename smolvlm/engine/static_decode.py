"""The decode step over buffers that stay where they are, so that a CUDA graph can replay it.

A batch fills the rows of a bucket: the next size up that there is a step for. Rows without a sequence stand at position
0 of a block that belongs to nobody and stay there. A sequence keeps its row while it is decoded, and only the rows of
those that join or leave are written from the host: the step itself brings tokens and positions forward. The host waits
once per step, for what was chosen.

Nothing here is special to CUDA: with a capture that gives the step back as it is, it runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from smolvlm.attention import Attention, KVCache
from smolvlm.engine.chosen import Chosen, read_tokens
from smolvlm.engine.sequence import Sequence
from smolvlm.model import SmolVLM
from smolvlm.sampling import SamplingTensors, choose_tokens

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # may run the step, on padding, before it gives back one that does the same
DecodeAttention = Callable[[Tensor, Tensor, KVCache], Attention]  # of positions [B], block table [B, N] and a cache

COARSE = 64  # buckets are powers of two up to here, multiples of it above


def bucket_size(batch: int) -> int:
    """Rows of the bucket for a batch: up to 64 the next power of two, above it the next multiple of 64."""
    return 1 << (batch - 1).bit_length() if batch <= COARSE else -(-batch // COARSE) * COARSE


class Bucket:
    """The buffers of one bucket and who sits in which row.

    `cursor` int64 [3, R]: last token, its position, by how much a step moves it (0 in padding). `table` int64 [R, N]:
    block tables. `settings` float32 [R, 3]: temperature, top_p, whether greedy. `uniform` float32 [R, 1]: the random
    numbers of one step. `chosen` float32 [2, R] and `logits` [R, V] are what the last step left.
    """

    def __init__(self, rows: int, pages: int, scratch: int, drawn: bool, device: torch.device) -> None:
        self.drawn = drawn  # whether some row may be other than greedy
        self.scratch = scratch
        self.cursor = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.table = torch.full((rows, pages), scratch, dtype=torch.int64, device=device)
        self.settings = torch.ones(rows, 3, device=device)
        self.uniform = torch.zeros(rows, 1, device=device)
        self.chosen = torch.zeros(2, rows, device=device)
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

    def shuffle(self, sequences: list[Sequence], rows: list[int]) -> None:
        """Take the next random number of each sequence."""
        numbers = np.zeros((len(self.uniform), 1), dtype=np.float32)
        numbers[rows, 0] = [sequence.random.random() for sequence in sequences]
        self.uniform.copy_(torch.from_numpy(numbers))

    @property
    def sampling(self) -> SamplingTensors | None:
        if not self.drawn:
            return None
        return SamplingTensors(self.settings[:, 0:1], self.settings[:, 1:2], self.settings[:, 2:3] > 0)

    def _write(self, joining: list[Sequence], rows: list[int]) -> None:
        """Put `joining` into the first of these rows and padding into the rest."""
        cursor = np.zeros((3, len(rows)), dtype=np.int64)
        table = np.full((len(rows), self.table.shape[1]), self.scratch)
        settings = np.ones((len(rows), 3), dtype=np.float32)
        for index, sequence in enumerate(joining):
            params = sequence.params
            cursor[:, index] = sequence.token_ids[-1], sequence.num_tokens - 1, 1
            table[index, : len(sequence.block_table)] = sequence.block_table
            if not params.is_greedy:
                settings[index] = params.temperature, params.top_p, 0
        places = torch.tensor(rows).to(self.table.device)
        for buffer, values, dim in ((self.cursor, cursor, 1), (self.table, table, 0), (self.settings, settings, 0)):
            buffer.index_copy_(dim, places, torch.from_numpy(values).to(places.device))
        for index, row in enumerate(rows):
            self._seats[row] = joining[index].id if index < len(joining) else None


class StaticDecoder:
    """Decodes with one captured step per bucket, made when first needed.

    Batches with a sequence that is not greedy have steps of their own, which sort the vocabulary.
    """

    def __init__(
        self, model: SmolVLM, cache: KVCache, device: torch.device, attention: DecodeAttention, capture: Capture
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.attention = attention
        self.capture = capture
        self._num_pages = -(-model.config.text.max_positions // cache.block_size)
        self._buckets: dict[tuple[int, bool], Bucket] = {}
        self._last: Bucket | None = None

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> Chosen:
        """Choose the next token of each sequence."""
        drawn = not all(sequence.params.is_greedy for sequence in sequences)
        bucket = self._bucket(bucket_size(len(sequences)), drawn)
        rows = bucket.seat(sequences)
        if drawn:
            bucket.shuffle(sequences, rows)
        bucket.step()
        return read_tokens(bucket.chosen, bucket.logits, sequences, rows)

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
        tokens, positions, advance = bucket.cursor
        attention = self.attention(positions, bucket.table, self.cache)
        bucket.logits = self.model(self.model.embed(tokens), attention)
        chosen, logprobs = choose_tokens(bucket.logits, bucket.sampling, bucket.uniform)
        torch.stack([chosen.float(), logprobs], out=bucket.chosen)
        tokens.copy_(chosen)
        positions.add_(advance)
