"""Images on their way through the vision encoder, shared by all sequences that ask about the same one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from smolvlm.image import Tiles


class EncodedImage:
    """The tiles of one image before encoding, its features [N, image_seq_len, H] after; each dropped when used up.

    A tile counts as encoded once that is launched; `last_batch` says what to wait for where the encoder has a stream of
    its own (VisionStream).
    """

    def __init__(self, tiles: Tiles) -> None:
        self.key = id(tiles)
        self.source = weakref.ref(tiles)
        self.pixels: npt.NDArray[np.uint8] | None = tiles.pixels
        self.num_tiles = len(tiles.pixels)
        self._scheduled = [False] * self.num_tiles
        self._batches: list[int | None] = [None] * self.num_tiles  # which encoder batch encoded them
        self.features: Tensor | None = None
        self.users = 0

    @property
    def num_encoded(self) -> int:
        return self.num_tiles - self._batches.count(None)

    @property
    def is_encoded(self) -> bool:
        return self.is_encoded_from(0)

    def is_encoded_from(self, first: int) -> bool:
        """Whether tile `first` and those behind it are encoded: all of them that a sequence needs."""
        return None not in self._batches[first:]

    def last_batch(self, first: int) -> int:
        """Number of the last encoder batch with any of these tiles, 0 where there was none."""
        return max((batch or 0 for batch in self._batches[first:]), default=0)

    def next_span(self, first: int, room: int) -> TileSpan | None:
        """The next up to `room` adjacent tiles from `first` on that no encoder batch has taken; now one has."""
        start = next((tile for tile in range(first, self.num_tiles) if not self._scheduled[tile]), None)
        if start is None:
            return None
        stop = start + 1
        while stop < min(start + room, self.num_tiles) and not self._scheduled[stop]:
            stop += 1
        self._scheduled[start:stop] = [True] * (stop - start)
        return TileSpan(self, start, stop)

    def give_back(self, span: TileSpan) -> None:
        """The batch with these tiles failed: those that are not encoded can be taken again."""
        for tile in range(span.start, span.stop):
            self._scheduled[tile] = self._batches[tile] is not None

    @property
    def embeddings(self) -> Tensor:
        """Image token embeddings of all tiles, in their order: [N * image_seq_len, H]."""
        assert self.features is not None, "features are dropped only after their last user was prefilled"
        return self.features.flatten(0, 1)

    def store(self, start: int, features: Tensor, batch: int = 0) -> None:
        """Copy the features [n, image_seq_len, H] of tiles start..start+n-1; after the last one the pixels go."""
        if self.features is None:
            self.features = features.new_empty((self.num_tiles, *features.shape[1:]))
        self.features[start : start + len(features)] = features
        self._batches[start : start + len(features)] = [batch] * len(features)
        if self.is_encoded:
            self.pixels = None


@dataclass(frozen=True)
class TileSpan:
    """Tiles start..stop-1 of an image: the part of it that goes into one encoder batch."""

    image: EncodedImage
    start: int
    stop: int

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        assert self.image.pixels is not None, "tiles are dropped only after all of them are encoded"
        return self.image.pixels[self.start : self.stop]


def next_spans(needed: Iterable[tuple[EncodedImage, int]], room: int) -> Iterator[TileSpan]:
    """The next up to `room` tiles of these images, each from its first that is needed on."""
    for image, first in needed:
        while room and (span := image.next_span(first, room)):
            room -= span.stop - span.start
            yield span


class ImageStore:
    """Gives the same EncodedImage for the same Tiles object while any sequence still needs it.

    Entries are found by the identity of the Tiles object, which a weak reference guards: the object may be gone, and
    another one at its address, while its features are still in use.
    """

    def __init__(self) -> None:
        self._images: dict[int, EncodedImage] = {}

    def __len__(self) -> int:
        return len(self._images)

    def acquire(self, tiles: Tiles) -> EncodedImage:
        """The shared image of these tiles; every acquire is answered by one release."""
        image = self._images.get(id(tiles))
        if image is None or image.source() is not tiles:
            image = self._images[id(tiles)] = EncodedImage(tiles)
        image.users += 1
        return image

    def release(self, image: EncodedImage) -> None:
        """One user needs the image no more; the last one drops its tiles and features."""
        assert image.users > 0, "image released more often than acquired"
        image.users -= 1
        if image.users == 0:
            image.pixels = image.features = None
            if self._images.get(image.key) is image:
                del self._images[image.key]
