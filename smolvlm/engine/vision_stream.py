"""The vision encoder on a stream of its own, beside prefill and decode.

Encoding is bound by arithmetic, decoding by reading memory: a GPU does both at once in less time than one after the
other. The host never waits for the encoder. It launches a batch, asks from time to time how far the device has come,
and has prefill wait on the device for the batch whose features it reads. What the encoder writes between two batches
(its static buffers, an image's features) is touched on its stream alone until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the order of a stream, as torch.cuda.Event."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def wait(self) -> None:
        """Hold up what is launched on the current stream from now on until the device has come to it."""


class Stream(Protocol):
    """What is done to a second stream: all that depends on the device."""

    def enter(self) -> AbstractContextManager[object]:
        """Make it the current stream, on which work is launched and memory allocated."""

    def mark(self) -> Event:
        """The point that it has been given work up to."""

    def lend(self, tensor: Tensor) -> None:
        """Keep its memory, should it be dropped, until the current stream has done what it was given up to then."""


class CudaStream:
    """Of a GPU; its work comes after all that the current stream was given before, such as copying the weights."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def enter(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def lend(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class VisionStream:
    """Encoder batches on a stream, numbered from 1 on; they come to an end in that order."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ends: deque[Event] = deque()  # of the batches under way
        self._num_begun = 0

    @contextmanager
    def batch(self) -> Iterator[int]:
        """Launch the next batch inside, also one that fails half-way; gives its number."""
        self._num_begun += 1
        with self._stream.enter():
            try:
                yield self._num_begun
            finally:
                self._ends.append(self._stream.mark())

    @property
    def num_under_way(self) -> int:
        """Batches that the device has not come to the end of."""
        while self._ends and self._ends[0].query():
            self._ends.popleft()
        return len(self._ends)

    @property
    def num_over(self) -> int:
        return self._num_begun - self.num_under_way

    def receive(self, number: int, features: Iterable[Tensor]) -> None:
        """Let the current stream wait for this batch and read these tensors, whenever they are dropped."""
        if (ahead := number - self.num_over) > 0:
            self._ends[ahead - 1].wait()
        for each in features:
            self._stream.lend(each)


def vision_stream(device: torch.device) -> VisionStream | None:
    """None on a CPU, which encodes, prefills and decodes in turn."""
    return VisionStream(CudaStream(device)) if device.type == "cuda" else None
