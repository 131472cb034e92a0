"""Tiles that are encoded before their sequences have pages: the encoder works on while others decode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from smolvlm.engine.admission import Queue
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.images import EncodedImage, TileSpan, next_spans
from smolvlm.engine.sequence import Sequence, Status


class Ahead:
    """The waiting sequences in the order of admission, as far as the encoder has not got to them.

    The features of those that it has got to are of at most `limit` tiles: they take memory beside the features of
    admitted sequences.
    """

    def __init__(self, limit: int, blocks: BlockManager) -> None:
        self.limit = limit
        self.blocks = blocks
        self._next = Queue()
        self._begun: dict[int, Sequence] = {}  # by Sequence.id

    def add(self, sequence: Sequence) -> None:
        self._forget_admitted()
        if sequence.images and self.limit:
            self._next.push(sequence)

    def spans(self, room: int, least: int) -> Iterator[TileSpan]:
        """Up to `room` tiles of those that come next; none where `least` more would pass the limit."""
        self._forget_admitted()
        held = _images(self._begun.values())
        if sum(image.num_encoded for image in held.values()) + least > self.limit:
            return
        num_tiles = sum(image.num_tiles for image in held.values())
        while room and (sequence := self._next.first()):
            new = {key: image for key, image in _images([sequence]).items() if key not in held}
            num_tiles += sum(image.num_tiles for image in new.values())
            if num_tiles > self.limit:
                return
            held |= new
            self._begun[sequence.id] = sequence
            for span in next_spans(sequence.tiles_behind(self._num_known(sequence)), room):
                room -= span.stop - span.start
                yield span
            if room:
                self._next.pop()

    def _num_known(self, sequence: Sequence) -> int:
        """Tokens of its prompt that others have computed: their tiles are not needed."""
        return len(self.blocks.find(sequence.missing_keys())) * self.blocks.block_size

    def _forget_admitted(self) -> None:
        self._next.first()
        self._begun = {number: each for number, each in self._begun.items() if each.status is Status.WAITING}


def _images(sequences: Iterable[Sequence]) -> dict[int, EncodedImage]:
    """Theirs by id, each once."""
    return {id(image): image for sequence in sequences for image in sequence.images}
