"""A request's images: from `data:` URLs to tiles. Decoding happens in processes that may die."""

import asyncio
import binascii
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from pipeline.decode_process import DecoderOptions
from pipeline.decoder import Decoder
from smolvlm.image import ImagePolicy, Tiles

_DATA_URL = re.compile(r"data:(?:image/[a-zA-Z0-9.+-]{1,64})?;base64,", re.ASCII | re.IGNORECASE)
_HEAD_CHARS = 128


class ImageRefused(ValueError):
    """An image that is not taken; `code` is one of `errors.IMAGE_MESSAGES`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class SplitImage:
    """An image as the model sees it, and its size in pixels after EXIF rotation."""

    tiles: Tiles
    width: int
    height: int


def data_url_bytes(url: str, max_bytes: int) -> bytes:
    """Return what a base64 `data:` URL holds. Raises ImageRefused; nothing but the string itself is looked at."""
    if not url[:5].lower() == "data:":
        raise ImageRefused("unsupported_url")
    head = _DATA_URL.match(url[:_HEAD_CHARS])
    if head is None:
        raise ImageRefused("invalid_data_url")
    if (len(url) - head.end()) // 4 * 3 > max_bytes + 3:
        raise ImageRefused("too_many_bytes")
    try:
        return binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ImageRefused("invalid_data_url") from None


def policy_for(base: ImagePolicy, detail: str, max_tiles: int | None) -> ImagePolicy:
    """Return the operator's policy as a request bends it: one tile, the checkpoint's own splitting, a cap on tiles."""
    policy = replace(base, max_tiles=max_tiles)
    if detail == "low":
        return replace(policy, image_splitting=False)
    return replace(policy, image_splitting=True, upscale=True) if detail == "high" else policy


class DecoderPool:
    """A few decoder processes, each with a thread that talks to it. An image gets one attempt."""

    def __init__(self, options: DecoderOptions, size: int) -> None:
        self._options = options
        self._idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        self._decoders = [Decoder(options, max_crashes=1) for _ in range(size)]
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="decoder")

    @property
    def max_bytes(self) -> int:
        """Bytes of the largest file that is decoded."""
        return self._options.limits.max_bytes

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that run now."""
        return [decoder.pid for decoder in self._decoders if decoder.pid is not None]

    def warm(self) -> None:
        """Start the children ahead of the first image."""
        for decoder in self._decoders:
            self._threads.submit(decoder.prepare, [b""])

    async def split(self, data: bytes, policy: ImagePolicy) -> SplitImage:
        """Decode and split one image; waits while all decoders are busy. Raises ImageRefused."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._split, data, policy)

    def close(self) -> None:
        """End the children."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    def _split(self, data: bytes, policy: ImagePolicy) -> SplitImage:
        decoder = self._idle.get()
        try:
            (prepared,), flat = decoder.prepare([data], policy)
        finally:
            self._idle.put(decoder)
        if prepared.error is not None:
            raise ImageRefused(prepared.error.code)
        assert prepared.num_tiles is not None
        assert prepared.width is not None
        assert prepared.height is not None
        side = self._options.config.tile_size
        pixels = np.frombuffer(flat, dtype=np.uint8).reshape(prepared.num_tiles, side, side, 3)
        return SplitImage(Tiles(pixels, prepared.rows, prepared.cols), prepared.width, prepared.height)
