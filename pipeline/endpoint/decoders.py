"""Decoding for requests: a few processes that may die, spoken to from the event loop.

A thread for each of them would be simpler, and twice the way between two threads costs as much as half a picture.
"""

import asyncio
from contextlib import suppress
from typing import Any

import numpy as np

from pipeline.decode_process import LENGTH, READY, DecoderOptions, batch_header
from pipeline.decoder_child import MAX_STARTS, DecoderChild, Prepared, TileMemory, does_not_start
from pipeline.endpoint.images import ImageRefused, SplitImage
from smolvlm.image import ImagePolicy, Tiles

_READ_BYTES = 1 << 16


class DecoderPool:
    """So many decoders. An image gets one attempt."""

    def __init__(self, options: DecoderOptions, size: int) -> None:
        self._options = options
        self._decoders = [_Decoder(options) for _ in range(size)]
        self._idle: asyncio.LifoQueue[_Decoder] = asyncio.LifoQueue()
        for decoder in self._decoders:
            self._idle.put_nowait(decoder)
        self._working: set[asyncio.Future[Any]] = set()

    @property
    def max_bytes(self) -> int:
        """Bytes of the largest file that is decoded."""
        return self._options.limits.max_bytes

    @property
    def policy(self) -> ImagePolicy:
        """How images are split where a request does not say otherwise."""
        return self._options.policy

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that run now."""
        return [decoder.child.pid for decoder in self._decoders if decoder.child is not None]

    def warm(self) -> None:
        """Start the children ahead of the first image, on the running event loop."""
        for _ in self._decoders:
            self._keep(asyncio.ensure_future(self._warm(self._idle.get_nowait())))

    async def split(self, data: bytes, policy: ImagePolicy) -> SplitImage:
        """Decode and split one image; waits while all decoders are busy. Raises ImageRefused."""
        decoder = await self._idle.get()
        work = asyncio.ensure_future(self._split(decoder, data, policy))
        self._keep(work)
        return await asyncio.shield(work)  # whoever asked may leave, but not in the middle of what the child reads

    def close(self) -> None:
        """End the children."""
        for decoder in self._decoders:
            decoder.close()

    def _keep(self, work: asyncio.Future[Any]) -> None:
        """The event loop itself forgets what nobody else holds."""
        self._working.add(work)
        work.add_done_callback(self._working.discard)

    async def _warm(self, decoder: "_Decoder") -> None:
        try:
            await decoder.ready()
        finally:
            self._idle.put_nowait(decoder)

    async def _split(self, decoder: "_Decoder", data: bytes, policy: ImagePolicy) -> SplitImage:
        try:
            prepared, flat = await decoder.decode(data, policy)
        finally:
            self._idle.put_nowait(decoder)
        if prepared.error is not None:
            raise ImageRefused(prepared.error.code)
        assert prepared.num_tiles is not None
        assert prepared.width is not None
        assert prepared.height is not None
        side = self._options.config.tile_size
        pixels = np.frombuffer(flat, dtype=np.uint8).reshape(prepared.num_tiles, side, side, 3)
        return SplitImage(Tiles(pixels, prepared.rows, prepared.cols), prepared.width, prepared.height)


class _Decoder:
    """One child, started again whenever it dies; one image at a time."""

    def __init__(self, options: DecoderOptions) -> None:
        self._options = options
        self._memory = TileMemory()
        self.child: DecoderChild | None = None

    async def decode(self, data: bytes, policy: ImagePolicy) -> tuple[Prepared, bytes]:
        """Return what became of an image, and its tiles' bytes. Raises ImageRefused if it ends the child."""
        child = await self.ready()
        line = await _answer(child, b"".join((batch_header(policy), LENGTH.pack(len(data)), data)))
        if not line:
            self._end()
            raise ImageRefused("quarantined")
        prepared = Prepared.from_line(line)
        return prepared, self._memory.read(prepared.num_bytes)

    async def ready(self) -> DecoderChild:
        """Return a living child. Raises PipelineError if none can be started."""
        if self.child is not None and self.child.is_alive:
            return self.child
        self._end()  # it died idle, of nothing that an image did
        for _ in range(MAX_STARTS):
            child = self.child = DecoderChild(self._options, self._memory)
            child.socket.setblocking(False)
            if await _answer(child) == READY:
                return child
            exit_code = self._end()
        raise does_not_start(exit_code)

    def close(self) -> None:
        """End the child."""
        self._end()
        self._memory.close()

    def _end(self) -> int:
        child, self.child = self.child, None
        return child.end(patience_s=0) if child else 0


async def _answer(child: DecoderChild, message: bytes = b"") -> bytes:
    """Send a message, and return the line that follows; nothing if the child has died."""
    loop, line = asyncio.get_running_loop(), b""
    with suppress(ConnectionError):
        await loop.sock_sendall(child.socket, message)
        while not line.endswith(b"\n"):
            received = await loop.sock_recv(child.socket, _READ_BYTES)
            if not received:
                return b""
            line += received
        return line
    return b""
