"""Names for what blocks of the key/value cache hold, so that equal beginnings of prompts are computed once.

The key of a block is a digest of its tokens, of the tiles whose image tokens lie in it, and of the key before it: it
stands for everything up to the block's end, hence for the very keys and values. A digest that nobody can forge is
needed, since a collision would answer one user from another one's prompt.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from smolvlm.image import Tiles

DIGEST_BYTES = 16


class BlockKeys:
    """The keys of a sequence's full blocks, as far as its tokens are known."""

    def __init__(self, block_size: int, image_token_id: int, image_seq_len: int, tile_names: list[bytes]) -> None:
        self.block_size = block_size
        self.image_token_id = image_token_id
        self.image_seq_len = image_seq_len
        self.tile_names = tile_names
        self._keys: list[bytes] = []
        self._num_image_tokens = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> bytes:
        return self._keys[index]

    def extend(self, token_ids: list[int]) -> None:
        """Add the keys of the blocks that `token_ids` fills; it repeats all tokens since the first."""
        start, stop = len(self._keys) * self.block_size, len(token_ids) // self.block_size * self.block_size
        blocks = np.asarray(token_ids[start:stop], dtype=np.int32).reshape(-1, self.block_size)
        counts = (blocks == self.image_token_id).sum(axis=1).tolist()
        for block, count in zip(blocks, counts, strict=True):
            parent = self._keys[-1] if self._keys else b""
            held = parent + block.tobytes() + b"".join(self._next_tiles(count))
            self._keys.append(blake2b(held, digest_size=DIGEST_BYTES).digest())

    def _next_tiles(self, count: int) -> list[bytes]:
        """Names of the tiles to which the next `count` image tokens belong."""
        first = self._num_image_tokens // self.image_seq_len
        self._num_image_tokens += count
        return self.tile_names[first : -(-self._num_image_tokens // self.image_seq_len)] if count else []


class TileNames:
    """Names of an image's tiles, one each, made once for each Tiles object while it lives. Safe from any thread."""

    def __init__(self, make: Callable[[Tiles], list[bytes]]) -> None:
        self._make = make
        self._known: dict[int, tuple[weakref.ref[Tiles], list[bytes]]] = {}

    def __call__(self, tiles: Tiles) -> list[bytes]:
        key = id(tiles)
        source, names = self._known.get(key, (None, []))
        if source is None or source() is not tiles:
            names = self._make(tiles)
            self._known[key] = weakref.ref(tiles, lambda _: self._known.pop(key, None)), names
        return names


def by_content(tiles: Tiles) -> list[bytes]:
    """Digests of the pixels, about 1 ms a tile of 512²: equal images have equal names whoever sends them."""
    return [blake2b(tile.ravel().data, digest_size=DIGEST_BYTES).digest() for tile in tiles.pixels]


def by_identity(tiles: Tiles) -> list[bytes]:
    """One random name for this very object, at no cost: for batch work, where only tasks on one image repeat it."""
    return [os.urandom(DIGEST_BYTES)] * len(tiles.pixels)
