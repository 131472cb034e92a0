"""Which waiting sequence gets memory next.

Online sequences go first. Batch work may fill `max_num_sequences` and all pages but a reserve; online sequences have
slots beyond that number, and the reserve, so that one that comes need not wait until a batch answer ends. Nothing is
thrown out to make room for them: to redo a batch sequence takes its work twice and its tiles in memory until the last
token (10 MB an image), while a reserve costs no work. The reserve of pages stands from the first online sequence on: an
engine that sees batch work alone has all of its cache for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, fields

from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.sequence import Sequence, Status

PATIENCE = 8  # turns of online work in a row, after which batch work that got none has one


@dataclass(frozen=True)
class Limits:
    """Bounds of one step, and what is kept for online sequences.

    max_num_sequences: sequences that hold pages; online ones may be `online_sequences` more.
    max_num_tokens: prompt tokens per prefill; a single prompt that is longer is prefilled alone.
    tile_batch: tiles per encoder batch.
    online_blocks: pages that batch sequences leave free for online ones.
    ahead_tiles: tiles of waiting sequences that may be encoded, where the encoder has a stream of its own.
    piece_tokens, piece_tiles: what takes the place of `max_num_tokens` and `tile_batch` for batch work once online
    sequences are about, which wait for the end of such a piece; prompts are cut to fit.

    Raises:
        ValueError: a bound is too low.
    """

    max_num_sequences: int
    max_num_tokens: int
    tile_batch: int
    online_sequences: int = 0
    online_blocks: int = 0
    piece_tokens: int = 512
    piece_tiles: int = 1
    ahead_tiles: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name.startswith(("online_", "ahead_")) else 1
            if (value := getattr(self, field.name)) < least:
                raise ValueError(f"{field.name} is {value!r}; it must be at least {least}")


class Queue:
    """Sequences by Sequence.order. They leave the heap when they wait no more and come to its top: that is free."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in list(self._heap) if sequence.status is Status.WAITING)

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.order, sequence))

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Take the first one out, though it waits."""
        heapq.heappop(self._heap)


class Admission:
    """The waiting sequences of both classes, and the rules by which they are given pages."""

    def __init__(self, limits: Limits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.online, self.batch = Queue(), Queue()
        self.serves_online = False  # stays true from the first online sequence on
        self._overtaken = 0  # online sequences admitted in a row while batch work waited and had nothing in the engine

    @property
    def has_waiting(self) -> bool:
        return (self.online.first() or self.batch.first()) is not None

    def add(self, sequence: Sequence) -> None:
        self.serves_online |= sequence.is_online
        (self.online if sequence.is_online else self.batch).push(sequence)

    def admit(self, active: list[Sequence]) -> Sequence | None:
        """Give pages to the next one beside the `active`; None if nobody waits or the next has to wait for memory.

        One that does not fit holds back those behind it.
        """
        online = [sequence for sequence in active if sequence.is_online]
        batch_is_due = len(online) == len(active) and self._overtaken >= PATIENCE
        sequence = (None if batch_is_due else self.online.first()) or self.batch.first() or self.online.first()
        if sequence is None or not self._has_slot(sequence, len(active), len(active) - len(online)):
            return None
        spare = 0 if sequence.is_online or batch_is_due else self._reserve(online)
        if not self._give_pages(sequence, spare):
            return None
        self._count_overtaking(sequence, num_batch=len(active) - len(online))
        return sequence

    def _has_slot(self, sequence: Sequence, num_active: int, num_batch: int) -> bool:
        limits = self.limits
        if num_active >= limits.max_num_sequences + limits.online_sequences:
            return False
        return sequence.is_online or num_batch < limits.max_num_sequences

    def _reserve(self, online: list[Sequence]) -> int:
        """Blocks to keep free for online sequences beside those that they hold."""
        if not self.serves_online:
            return 0
        return max(0, self.limits.online_blocks - sum(len(sequence.block_table) for sequence in online))

    def _give_pages(self, sequence: Sequence, spare: int) -> bool:
        found = self.blocks.find(sequence.missing_keys())
        blocks = self.blocks.allocate(sequence.max_tokens, found, spare)
        if blocks is None:
            return False
        sequence.block_table, sequence.status = blocks, Status.ADMITTED
        sequence.take_over(len(found))
        return True

    def _count_overtaking(self, sequence: Sequence, num_batch: int) -> None:
        overtakes = sequence.is_online and num_batch == 0 and self.batch.first() is not None
        self._overtaken = self._overtaken + 1 if overtakes else 0
