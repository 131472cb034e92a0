"""From the host's memory to the device's, without waiting for either, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]  # [n, S, S, 3]
Upload = Callable[[list[Pixels]], Tensor]  # joins parts to one batch


def send(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, in the order of its current stream; the host goes on at once.

    From ordinary memory torch would wait until the device has done all that it was given.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor, as it is now in the order of the stream, to the host; the result waits for the copy."""
    if tensor.device.type != "cuda":
        copy = tensor.clone()
        return lambda: copy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def join(parts: list[Pixels]) -> Tensor:
    """For a CPU."""
    return torch.from_numpy(np.concatenate(parts))


class StreamUpload:
    """For a GPU: copies on a stream of its own, beside what the device is computing.

    32 tiles are 25 MB, a good part of the time that encoding them takes. From pinned memory the host need not wait for
    the copy either; torch's allocators keep both buffers until the streams are done with them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, parts: list[Pixels]) -> Tensor:
        size = (sum(len(part) for part in parts), *parts[0].shape[1:])
        staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        np.concatenate(parts, out=staged.numpy())
        with torch.cuda.stream(self._stream):
            pixels = staged.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        pixels.record_stream(current)
        return pixels


def upload_to(device: torch.device) -> Upload:
    return StreamUpload(device) if device.type == "cuda" else join
