"""What the engine does next: encode tiles, prefill prompts, or decode one token for everyone.

With batch work alone, the decode batch is kept full: encoding and prefill go first. Once online sequences are about,
batch work comes in small pieces and theirs goes before it; while one of them is being answered, a decode follows every
batch piece and every second piece of their own: a small image is encoded and prefilled at once. Batch work takes what
is left, and at least one turn in PATIENCE + 1.

An encoder with a stream of its own (VisionStream) is given its next batch before the last is over, and then tiles of
sequences that still wait for pages. Everyone decodes until tiles are encoded; only where nobody would, or where batch
answers alone would go before an online image, does a prefill wait for them.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smolvlm.engine.admission import PATIENCE, Admission, Limits
from smolvlm.engine.ahead import Ahead
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.images import ImageStore, TileSpan, next_spans
from smolvlm.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from smolvlm.engine.vision_stream import VisionStream


@dataclass(frozen=True)
class Encode:
    """Run the vision encoder over these tiles, of one image or several."""

    spans: list[TileSpan]


@dataclass(frozen=True)
class Prefill:
    """Run the text decoder over these prompts, from `num_computed` to `num_scheduled`; those that end there get their
    first token."""

    sequences: list[Sequence]


@dataclass(frozen=True)
class Decode:
    """Choose the next token of each of these sequences."""

    sequences: list[Sequence]


Work = Encode | Prefill | Decode
MAX_DELAY = 2  # pieces of online work between two decodes while an online sequence is answered
QUEUED = 2  # encoder batches on a stream of their own: one that runs and one that follows without a gap


class Scheduler:
    """Sequences by status. Touches no tensor: the runner executes what `schedule` returns.

    `vision` tells how far the encoder is, where it has a stream of its own.
    """

    def __init__(self, limits: Limits, blocks: BlockManager, vision: VisionStream | None = None) -> None:
        self.limits = limits
        self.blocks = blocks
        self.vision = vision
        self.images = ImageStore()
        self.waiting = Admission(limits, blocks)
        self.ahead = Ahead(limits.ahead_tiles if vision else 0, blocks)
        self.admitted: list[Sequence] = []  # sorted by Sequence.order
        self.running: list[Sequence] = []
        self._delay = 0  # pieces of work since the last decode; one of batch work counts as MAX_DELAY
        self._overtaken = 0  # pieces of online work in a row that went before batch work
        self._cuts_all = False  # whether any prompt may be cut, because a whole one did not fit into memory
        self._decodes_next = True  # whether the next turn of batch work, if it may be either, is a decode

    @property
    def has_unfinished(self) -> bool:
        return bool(self.admitted or self.running or self.waiting.has_waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; from here on it shares the images that others ask about as well."""
        sequence.images = [self.images.acquire(tiles) for tiles in sequence.tiles]
        sequence.tiles = []
        self.waiting.add(sequence)
        self.ahead.add(sequence)

    def schedule(self) -> Work | None:
        """The next piece of work, None if there is nothing to do."""
        self._admit()
        for sequence in self.admitted:
            self._take_over(sequence)
        return self._next_work()

    def start(self, sequences: list[Sequence]) -> list[Sequence]:
        """These are prefilled up to `num_scheduled`. Those whose prompt is complete decode from now on: return them."""
        for sequence in sequences:
            computed, sequence.num_computed = sequence.num_computed, sequence.num_scheduled
            self._remember(sequence, computed, sequence.num_computed)
            self._drop_images(sequence, sequence.num_computed)
        complete = [sequence for sequence in sequences if sequence.num_missing == 0]
        for sequence in complete:
            sequence.status = Status.RUNNING
        self.running += complete
        self.admitted = [sequence for sequence in self.admitted if sequence.status is Status.ADMITTED]
        return complete

    def finish(self, sequences: list[Sequence]) -> None:
        """Take finished sequences out of their queue and give back all that they hold.

        What online ones computed stays findable for the next turn of a conversation; batch prompts hardly come back.
        """
        for sequence in sequences:
            if sequence.is_online and sequence.status is Status.RUNNING:
                self._remember_answer(sequence)
            self._drop_images(sequence, len(sequence.prompt_token_ids))
            self.blocks.release(sequence.block_table, keep=sequence.is_online)
            sequence.status = Status.FINISHED
        self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; one that is finished already stays as it is."""
        if sequence.status is Status.FINISHED:
            return
        sequence.finish_reason = "aborted"
        self.finish([sequence])
        self.admitted = [each for each in self.admitted if each is not sequence]

    def halve(self, work: Work) -> str | None:
        """The device had no memory for this work: queue it again, and give out half as much at once from now on.

        Says what the new limit is; None if the work was as small as it gets, or is a decode, which no limit bounds.
        """
        match work:
            case Encode(spans) if (tiles := sum(span.stop - span.start for span in spans)) > 1:
                for span in spans:
                    span.image.give_back(span)
                self.limits = replace(self.limits, tile_batch=tiles // 2)
                return f"{tiles // 2} tiles per encoder batch"
            case Prefill(sequences):
                tokens = sum(sequence.num_scheduled - sequence.num_computed for sequence in sequences)
                if tokens > 1:
                    most = min(tokens // 2, self.limits.max_num_tokens)
                    self.limits, self._cuts_all = replace(self.limits, max_num_tokens=most), True
                    return f"{most} tokens per prefill"
        return None

    def _admit(self) -> None:
        while sequence := self.waiting.admit(self.admitted + self.running):
            self._drop_images(sequence, sequence.num_computed)
            insort(self.admitted, sequence, key=lambda each: each.order)

    def _next_work(self) -> Work | None:
        if not self.admitted:
            return self._encode_ahead() or self._decode()
        online = [sequence for sequence in self.admitted if sequence.is_online]
        batch = self.admitted[len(online) :]
        answering = any(sequence.is_online for sequence in self.running)
        awaited = answering or (
            not online and self.waiting.online.first() is not None
        )  # tokens, or the memory they hold
        if self.running and awaited and self._delay >= (MAX_DELAY if online else 1):
            return self._decode()
        starved = batch or (self.running and not answering)
        if online and not (starved and self._overtaken >= PATIENCE):
            work = self._piece(online)
            self._overtaken += bool(starved) and not isinstance(work, Decode)
            return work
        self._overtaken = 0
        return self._batch_turn(batch, decodes=bool(online and self.running and not answering))

    def _batch_turn(self, batch: list[Sequence], decodes: bool) -> Work | None:
        """A piece of batch work; where online work keeps batch sequences from decoding too, that every other time."""
        if decodes and (self._decodes_next or not batch):
            self._decodes_next = False
            return self._decode()
        self._decodes_next = True
        return self._piece(batch)

    def _decode(self) -> Decode | None:
        self._delay = 0
        return Decode(list(self.running)) if self.running else None

    def _piece(self, group: list[Sequence]) -> Work | None:
        """Prefill what is ready or encode what is not, of admitted sequences of one class.

        Batch prompts that could be packed with more of them wait for the images of those; online ones wait for nobody.
        """
        urgent = group[0].is_online
        self._delay += 1 if urgent else MAX_DELAY
        encoded = [sequence for sequence in group if sequence.is_encoded]
        pending = [sequence for sequence in group if not sequence.is_encoded]
        if self.vision is not None:
            return self._piece_beside(self.vision, urgent, encoded, pending)
        return self._prefill(encoded, urgent, waits=bool(pending)) or self._encode(pending, urgent)

    def _piece_beside(
        self, vision: VisionStream, urgent: bool, encoded: list[Sequence], pending: list[Sequence]
    ) -> Work | None:
        """Keep the encoder busy, prefill what has come from it, and decode while more is to come."""
        if vision.num_under_way < self._max_queued(urgent) and (encode := self._encode(pending, urgent)):
            return encode
        num_over = vision.num_over
        over = [sequence for sequence in encoded if sequence.last_batch <= num_over]
        waits = bool(self.running and len(over) < len(encoded) + len(pending))
        if prefill := self._prefill(over, urgent, waits):
            return prefill
        if self.running and (not urgent or any(sequence.is_online for sequence in self.running)):
            return self._decode()
        first = [sequence for sequence in encoded if sequence.last_batch <= encoded[0].last_batch]
        return self._prefill(first, urgent, waits=False) or self._encode(pending, urgent)

    def _prefill(self, encoded: list[Sequence], urgent: bool, waits: bool) -> Prefill | None:
        """As many of these prompts as one prefill takes; batch ones that do not fill it may wait for others."""
        cuts = self.waiting.serves_online and not (urgent and not self.running)
        most = self.limits.max_num_tokens
        max_tokens = min(self.limits.piece_tokens, most) if cuts else most
        packed = _packed(encoded, max_tokens, cuts or self._cuts_all)
        return Prefill(packed) if packed and (urgent or not waits or _is_full(packed, max_tokens)) else None

    def _encode(self, pending: list[Sequence], urgent: bool) -> Encode | None:
        """Tiles of these; what batch ones leave of an encoder batch is for sequences that wait."""
        limits, whole = self.limits, urgent or not self.waiting.serves_online
        room = limits.tile_batch if whole else min(limits.piece_tiles, limits.tile_batch)
        spans = list(next_spans((needed for sequence in pending for needed in sequence.needed_tiles()), room))
        if not urgent:
            least = room - sum(span.stop - span.start for span in spans)
            spans += self.ahead.spans(least, least)
        return Encode(spans) if spans else None

    def _encode_ahead(self) -> Encode | None:
        """Tiles of sequences that wait, if the encoder is free; while an online one is answered, a decode follows."""
        if self.vision is None or self.vision.num_under_way >= self._max_queued(urgent=False):
            return None
        if self._delay and any(sequence.is_online for sequence in self.running):
            return None
        work = self._encode([], urgent=False)
        self._delay += MAX_DELAY if work else 0
        return work

    def _max_queued(self, urgent: bool) -> int:
        """Batch work is queued for the encoder only as long as no online image may come that would wait for it."""
        return QUEUED if urgent or not self.waiting.serves_online else 1

    def _take_over(self, sequence: Sequence) -> None:
        """Let it refer to what others have computed of its prompt since it was admitted."""
        if found := self.blocks.find(sequence.missing_keys()):
            self.blocks.exchange(sequence.block_table, sequence.num_computed // self.blocks.block_size, found)
            sequence.take_over(len(found))
            self._drop_images(sequence, sequence.num_computed)

    def _remember(self, sequence: Sequence, start: int, stop: int) -> None:
        """Make the blocks findable that tokens start..stop-1 have filled."""
        if sequence.keys is not None:
            size = self.blocks.block_size
            for index in range(start // size, stop // size):
                self.blocks.remember(sequence.block_table[index], sequence.keys[index])

    def _remember_answer(self, sequence: Sequence) -> None:
        """All but its last token, whose keys and values nobody needed."""
        if sequence.keys is not None:
            stored = (sequence.prompt_token_ids + sequence.token_ids)[:-1]
            sequence.keys.extend(stored)
            self._remember(sequence, len(sequence.prompt_token_ids), len(stored))

    def _drop_images(self, sequence: Sequence, num_tokens: int) -> None:
        """Release the images whose tokens all lie in the first `num_tokens` of the prompt."""
        while sequence.images and sequence.tile_ends[0][-1] <= num_tokens:
            self.images.release(sequence.images.pop(0))
            sequence.tile_ends.pop(0)


def _packed(ready: list[Sequence], room: int, cuts: bool) -> list[Sequence]:
    """The first that fit into one prefill, each up to its `num_scheduled`; the last one in part if that `cuts` prompts.

    One that begins like another waits, to take over what that one computes.
    """
    packed: list[Sequence] = []
    under_way: set[bytes | None] = set()
    for sequence in ready:
        key = next(sequence.missing_keys(), None)
        if key is not None and key in under_way:
            continue
        part = min(sequence.num_missing, room) if cuts else sequence.num_missing
        if packed and not 0 < part <= room:
            break
        sequence.num_scheduled = sequence.num_computed + part
        packed.append(sequence)
        under_way.add(key)
        room -= part
    return packed


def _is_full(packed: list[Sequence], max_tokens: int) -> bool:
    """Whether another prompt like these would not fit: waiting for more images gains nothing."""
    used = sum(sequence.num_scheduled - sequence.num_computed for sequence in packed)
    return used + used // len(packed) > max_tokens
