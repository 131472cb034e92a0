"""What the engine does next: encode tiles, prefill prompts, or decode one token for everyone.

A throughput engine wants its decode batch full, so that encoding and prefill go first; among sequences of different
priority the higher one goes first, and work for a lower one may delay its decode by one piece at a time.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, fields

from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.images import ImageStore, TileSpan
from smolvlm.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Limits:
    """Bounds of one step: sequences that hold pages, prompt tokens per prefill, tiles per encoder batch.

    A single prompt longer than `max_num_tokens` is prefilled alone.

    Raises:
        ValueError: a bound is below 1.
    """

    max_num_sequences: int
    max_num_tokens: int
    tile_batch: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} is {value!r}; it must be at least 1")


@dataclass(frozen=True)
class Encode:
    """Run the vision encoder over these tiles, of one image or several."""

    spans: list[TileSpan]


@dataclass(frozen=True)
class Prefill:
    """Run the text decoder over these whole prompts and choose their first tokens."""

    sequences: list[Sequence]


@dataclass(frozen=True)
class Decode:
    """Choose the next token of each of these sequences."""

    sequences: list[Sequence]


class Scheduler:
    """Queues of sequences by status. Touches no tensor: the runner executes what `schedule` returns."""

    def __init__(self, limits: Limits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.images = ImageStore()
        self.waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap by Sequence.order
        self.admitted: list[Sequence] = []  # sorted by Sequence.order
        self.running: list[Sequence] = []
        self._decoded_last = False

    @property
    def has_unfinished(self) -> bool:
        return bool(self._next_waiting() or self.admitted or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; from here on it shares the images that others ask about as well."""
        sequence.images = [self.images.acquire(tiles) for tiles in sequence.tiles]
        sequence.tiles = []
        heapq.heappush(self.waiting, (sequence.order, sequence))

    def schedule(self) -> Encode | Prefill | Decode | None:
        """The next piece of work, None if there is nothing to do."""
        self._admit()
        if self._must_decode():
            self._decoded_last = True
            return Decode(list(self.running))
        self._decoded_last = False
        return self._prefill_or_encode()

    def start(self, sequences: list[Sequence]) -> None:
        """These are prefilled: their images are used up, they decode from now on."""
        for sequence in sequences:
            self._release_images(sequence)
            sequence.status = Status.RUNNING
            self.running.append(sequence)
        self.admitted = [sequence for sequence in self.admitted if sequence.status is Status.ADMITTED]

    def finish(self, sequences: list[Sequence]) -> None:
        """Take finished sequences out of their queue and give back all that they hold."""
        for sequence in sequences:
            self._release_images(sequence)
            self.blocks.release(sequence.block_table)
            sequence.status = Status.FINISHED
        self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; one that is finished already stays as it is."""
        if sequence.status is Status.FINISHED:
            return
        sequence.finish_reason = "aborted"
        self.finish([sequence])
        self.admitted = [each for each in self.admitted if each is not sequence]

    def _admit(self) -> None:
        """Give pages to waiting sequences in order; one that does not fit yet holds back those behind it."""
        while (sequence := self._next_waiting()) and self._reserve(sequence):
            heapq.heappop(self.waiting)
            insort(self.admitted, sequence, key=lambda each: each.order)

    def _next_waiting(self) -> Sequence | None:
        """The first that waits; those that were aborted meanwhile leave the heap here, where it costs nothing."""
        while self.waiting and self.waiting[0][1].status is Status.FINISHED:
            heapq.heappop(self.waiting)
        return self.waiting[0][1] if self.waiting else None

    def _reserve(self, sequence: Sequence) -> bool:
        if len(self.admitted) + len(self.running) >= self.limits.max_num_sequences:
            return False
        blocks = self.blocks.allocate(sequence.max_tokens)
        if blocks is not None:
            sequence.block_table, sequence.status = blocks, Status.ADMITTED
        return blocks is not None

    def _must_decode(self) -> bool:
        """Decode if nothing else is to do, or if a running sequence outranks what is and has waited one turn."""
        if not self.running or not self.admitted:
            return bool(self.running)
        return not self._decoded_last and max(s.priority for s in self.running) > self.admitted[0].priority

    def _prefill_or_encode(self) -> Encode | Prefill | None:
        ready = list(self._fitting([sequence for sequence in self.admitted if sequence.is_encoded]))
        pending = next((sequence for sequence in self.admitted if not sequence.is_encoded), None)
        if ready and (pending is None or self._is_full(ready) or ready[0].priority > pending.priority):
            return Prefill(ready)
        return Encode(list(self._next_spans())) if pending is not None else None

    def _fitting(self, ready: list[Sequence]) -> Iterator[Sequence]:
        room = self.limits.max_num_tokens
        for position, sequence in enumerate(ready):
            room -= len(sequence.prompt_token_ids)
            if room < 0 and position > 0:
                return
            yield sequence

    def _is_full(self, ready: list[Sequence]) -> bool:
        """Whether another prompt like these would not fit: waiting for more images gains nothing."""
        used = sum(len(sequence.prompt_token_ids) for sequence in ready)
        return used + used // len(ready) > self.limits.max_num_tokens

    def _next_spans(self) -> Iterator[TileSpan]:
        room = self.limits.tile_batch
        for image in (image for sequence in self.admitted for image in sequence.images):
            start, stop = image.num_scheduled, min(image.num_tiles, image.num_scheduled + room)
            if stop > start:
                image.num_scheduled = stop
                room -= stop - start
                yield TileSpan(image, start, stop)
            if room == 0:
                return

    def _release_images(self, sequence: Sequence) -> None:
        for image in sequence.images:
            self.images.release(image)
        sequence.images = []
