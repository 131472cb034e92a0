"""Decoding for requests: a few processes that may die, spoken to from the event loop.

A thread for each of them would be simpler, and twice the way between two threads costs as much as half a picture.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.decode_process import LENGTH, READY, DecoderOptions, batch_header
from pipeline.decoder_child import MAX_STARTS, DecoderChild, Prepared, TileMemory, does_not_start
from pipeline.endpoint.images import ImageRefused, SplitImage
from smolvlm.image import ImagePolicy, Tiles, UInt8

MEMORIES = 3  # of a decoder: one to decode into, the others with requests on their way to an engine


class DecoderPool:
    """So many decoders. An image gets one attempt."""

    def __init__(self, options: DecoderOptions, size: int) -> None:
        self._options = options
        self._idle: asyncio.LifoQueue[_Decoder] = asyncio.LifoQueue()
        self._decoders = [_Decoder(replace(options, with_sha256=False), self._idle.put_nowait) for _ in range(size)]
        for decoder in self._decoders:
            self._idle.put_nowait(decoder)
        self._starting: set[asyncio.Future[None]] = set()

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
            self._start(self._idle.get_nowait())

    async def split(self, data: bytes, policy: ImagePolicy) -> SplitImage:
        """Decode and split one image; waits while all decoders are busy. Raises ImageRefused."""
        while not (decoder := await self._idle.get()).is_ready:
            await asyncio.shield(self._start(decoder))  # whoever asked may leave; others are glad of it
        return await decoder.split(data, policy)

    def close(self) -> None:
        """End the children."""
        for decoder in self._decoders:
            decoder.close()

    def _start(self, decoder: "_Decoder") -> asyncio.Future[None]:
        """The event loop itself forgets what nobody else holds."""
        starting = asyncio.ensure_future(decoder.start())
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        return starting


class _Decoder:
    """One child after the other; one image at a time. `idle` is told when it can take another."""

    def __init__(self, options: DecoderOptions, idle: Callable[["_Decoder"], None]) -> None:
        self._options, self._idle = options, idle
        self._memories = [TileMemory() for _ in range(MEMORIES)]
        self._free = list(self._memories)
        self._talk: _Talk | None = None
        self._heard: Callable[[bytes], None] | None = None
        self.child: DecoderChild | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is a child that has not died."""
        return self._talk is not None

    async def start(self) -> None:
        """Get a child. Raises PipelineError if none can be started."""
        try:
            for _ in range(MAX_STARTS):
                if await self._begin() == READY:
                    return
                exit_code = self._end()
        finally:
            self._idle(self)
        raise does_not_start(exit_code)

    def split(self, data: bytes, policy: ImagePolicy) -> asyncio.Future[SplitImage]:
        """Have the child decode and split an image. Who waits for it may leave; the child is heard all the same."""
        assert self._talk is not None
        answer: asyncio.Future[SplitImage] = asyncio.get_running_loop().create_future()
        self._heard = partial(self._answer, answer)
        header = batch_header(policy, self._memories.index(self._free[0]))
        self._talk.say(b"".join((header, LENGTH.pack(len(data)), data)))
        return answer

    def close(self) -> None:
        """End the child."""
        self._end()
        for memory in self._memories:
            memory.close()

    async def _begin(self) -> bytes:
        """Start a child and return what it says first."""
        loop = asyncio.get_running_loop()
        first: asyncio.Future[bytes] = loop.create_future()
        self._heard = first.set_result
        self.child = DecoderChild(self._options, self._memories)
        _, self._talk = await loop.create_unix_connection(lambda: _Talk(self._hear), sock=self.child.socket)
        return await first

    def _hear(self, line: bytes) -> None:
        heard, self._heard = self._heard, None
        if not line:
            self._end()
        if heard is not None:  # else it died idle, of nothing that an image did
            heard(line)

    def _answer(self, answer: "asyncio.Future[SplitImage]", line: bytes) -> None:
        try:
            found: SplitImage | Exception = self._found(line)
        except Exception as error:  # whatever the child says, somebody waits
            found = error
        self._idle(self)
        if answer.done():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def _found(self, line: bytes) -> SplitImage:
        if not line:
            raise ImageRefused("quarantined")
        prepared = Prepared.from_line(line)
        if prepared.error is not None:
            raise ImageRefused(prepared.error.code)
        assert prepared.num_tiles is not None
        assert prepared.width is not None
        assert prepared.height is not None
        side = self._options.config.tile_size
        pixels = self._taken(prepared.num_bytes).reshape(prepared.num_tiles, side, side, 3)
        return SplitImage(Tiles(pixels, prepared.rows, prepared.cols), prepared.width, prepared.height)

    def _taken(self, size: int) -> UInt8:
        """The tiles as they lie there, if there is another memory for the next ones; a large picture's copy takes as
        long as decoding a small one, and all other requests wait for it."""
        if len(self._free) == 1:
            return np.frombuffer(self._free[0].read(size), np.uint8)
        return self._free.pop(0).lend(size, self._free.append)

    def _end(self) -> int:
        child, self.child = self.child, None
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.end()
        return child.end(patience_s=0) if child else 0


class _Talk(asyncio.Protocol):
    """With one child. `hear` gets each line that it says, and an empty one when it has died."""

    def __init__(self, hear: Callable[[bytes], None]) -> None:
        self._hear, self._line = hear, b""

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def say(self, message: bytes) -> None:
        """Send it, whenever the child reads it."""
        self._transport.write(message)

    def end(self) -> None:
        """Hear no more."""
        self._hear = lambda line: None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._line += data
        if self._line.endswith(b"\n"):
            line, self._line = self._line, b""
            self._hear(line)

    def connection_lost(self, error: Exception | None) -> None:
        self._hear(b"")
