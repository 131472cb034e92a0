"""The vision encoder over buffers that stay where they are, so that a CUDA graph can replay it.

A batch of tiles fills a bucket: the next size up that there is a recording for; what it does not fill is whatever lay
there before, and its features are left out. As in static_decode, nothing here is special to CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from smolvlm.engine.static_decode import Capture, Step

FINE = 8  # buckets are powers of two up to here, multiples of it above
Encode = Callable[[Tensor], Tensor]  # tiles [N, S, S, 3] → features [N, image_seq_len, H]


def bucket_tiles(num_tiles: int) -> int:
    """Tiles of the bucket for so many: up to 8 the next power of two, above it the next multiple of 8."""
    return 1 << (num_tiles - 1).bit_length() if num_tiles <= FINE else -(-num_tiles // FINE) * FINE


@dataclass
class TileBucket:
    pixels: Tensor  # uint8 [R, S, S, 3]
    features: Tensor  # [R, image_seq_len, H], what the last step left
    step: Step


class StaticEncoder:
    """Encodes with one captured step per bucket, made when first needed."""

    def __init__(self, encode: Encode, capture: Capture) -> None:
        self.encode = encode
        self.capture = capture
        self._buckets: dict[int, TileBucket] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 tiles [N, S, S, 3] → [N, image_seq_len, H], overwritten by the next call."""
        bucket = self._bucket(bucket_tiles(len(pixels)), pixels)
        bucket.pixels[: len(pixels)].copy_(pixels)
        bucket.step()
        return bucket.features[: len(pixels)]

    def _bucket(self, num_tiles: int, pixels: Tensor) -> TileBucket:
        bucket = self._buckets.get(num_tiles)
        if bucket is None:
            bucket = TileBucket(pixels.new_zeros((num_tiles, *pixels.shape[1:])), torch.empty(0), lambda: None)
            bucket.step = self.capture(partial(self._step, bucket))
            self._buckets[num_tiles] = bucket
        return bucket

    def _step(self, bucket: TileBucket) -> None:
        bucket.features = self.encode(bucket.pixels)
