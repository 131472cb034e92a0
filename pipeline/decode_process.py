"""The process that touches untrusted image bytes: it reads images from stdin and writes tiles into shared memory.

It may crash, hang or run out of memory; `pipeline.decoder` notices and starts another. Run as
`python -m pipeline.decode_process '<json of DecoderOptions>' <shared memory file descriptor>`.

Protocol. In: length (8 bytes, big-endian) and that many bytes of image. Length 2**63 + n begins a new batch, whose
tiles go to the start of the shared memory again; n bytes of JSON follow, the batch's own ImagePolicy (n = 0: the
options'). Out: `ready`, then one JSON line per image; its tiles are the next `num_bytes` of the shared memory.
"""

import hashlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from smolvlm.config import ImageConfig
from smolvlm.cpu.build import native_library
from smolvlm.image import ImageError, ImageLimits, ImagePolicy, Tiles, decode_image, split_decoded

NEW_BATCH = 1 << 63
READY = b"ready\n"
LENGTH = struct.Struct(">Q")


@dataclass(frozen=True)
class DecoderOptions:
    """What the process needs to know, as one JSON argument."""

    config: ImageConfig
    policy: ImagePolicy
    limits: ImageLimits
    timeout_s: float
    memory_bytes: int

    def to_json(self) -> str:
        """Return the command-line form."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DecoderOptions":
        """Read the command-line form."""
        content = json.loads(text)
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content["config"].items()
        }
        return cls(
            ImageConfig(**config),
            ImagePolicy(**content["policy"]),
            ImageLimits(**content["limits"]),
            content["timeout_s"],
            content["memory_bytes"],
        )


@lru_cache  # an endpoint's requests ask for the same few
def batch_header(policy: ImagePolicy | None) -> bytes:
    """Return what begins a batch."""
    text = b"" if policy is None else json.dumps(asdict(policy)).encode()
    return LENGTH.pack(NEW_BATCH + len(text)) + text


def main() -> None:
    """Serve until stdin ends."""
    options = DecoderOptions.from_json(sys.argv[1])
    for name in ("resize", "pack"):
        native_library(name)  # compiling them is nothing that an image's time or memory pays for
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(4)  # an engine on the same CPUs works with threads in step: a core taken from one of them stops them all
    memory, used, policy = _SharedMemory(int(sys.argv[2])), 0, options.policy
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while (length := _read_length(sys.stdin.buffer)) is not None:
        if length >= NEW_BATCH:
            text = sys.stdin.buffer.read(length - NEW_BATCH)
            used, policy = 0, ImagePolicy(**json.loads(text)) if text else options.policy
            continue
        answer, tiles = _decode(sys.stdin.buffer.read(length), options, policy)
        if tiles is not None:
            memory.write(used, tiles)
            used += tiles.pixels.nbytes
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _decode(data: bytes, options: DecoderOptions, policy: ImagePolicy) -> tuple[dict[str, Any], Tiles | None]:
    answer: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": 0}
    # The default action of SIGALRM ends the process, even in the middle of a C call: a hang becomes a death.
    signal.setitimer(signal.ITIMER_REAL, options.timeout_s)
    try:
        decoded = decode_image(data, options.limits, policy.needed(options.config))
        answer |= {"width": decoded.width, "height": decoded.height, "format": decoded.format}
        tiles = split_decoded(decoded, options.config, policy)
    except Exception as error:  # whatever a codec raises is this image's error, not the batch's
        return answer | _failure(error, options), None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    pixels = tiles.pixels
    grid = {"num_tiles": len(pixels), "rows": tiles.rows, "cols": tiles.cols, "num_bytes": pixels.nbytes}
    return answer | grid, tiles


def _failure(error: Exception, options: DecoderOptions) -> dict[str, str]:
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return {"code": "out_of_memory", "message": f"decoding needs more than {options.memory_bytes} bytes"}
    if isinstance(error, ImageError):
        return {"code": error.code, "message": str(error)}
    return {"code": "decode_failed", "message": f"{type(error).__name__}: {error}"[:500]}


def _read_length(stream: BinaryIO) -> int | None:
    header = stream.read(LENGTH.size)
    return int(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else None


class _SharedMemory:
    """The file that both processes map; it grows to the largest batch and stays."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def write(self, start: int, tiles: Tiles) -> None:
        stop = start + tiles.pixels.nbytes
        if self._map is None or len(self._map) < stop:
            size = max(stop, os.fstat(self._descriptor).st_size)
            os.ftruncate(self._descriptor, size)
            self._map = mmap.mmap(self._descriptor, size)
        self._map[start:stop] = tiles.pixels.data.cast("B")


if __name__ == "__main__":
    main()
