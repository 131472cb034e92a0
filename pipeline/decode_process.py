"""The process that touches untrusted image bytes: it reads images from stdin and writes tiles into shared memory.

It may crash, hang or run out of memory; `pipeline.decoder` notices and starts another. Run as
`python -m pipeline.decode_process '<json of DecoderOptions>' <shared memory file descriptors>…`.

Protocol. In: length (8 bytes, big-endian) and that many bytes of image. Length 2**63 + n begins a new batch; n bytes of
JSON follow: `memory`, which of the shared memories its tiles go to, from the start; `policy`, its own ImagePolicy
(null: the options'). Out: `ready`, then one JSON line per image; its tiles are the next `num_bytes` of the memory.
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
    with_sha256: bool = True
    """Whether answers tell what a file hashes to."""

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
            content["with_sha256"],
        )


@lru_cache  # an endpoint's requests ask for the same few
def batch_header(policy: ImagePolicy | None, memory: int = 0) -> bytes:
    """Return what begins a batch."""
    text = json.dumps({"memory": memory, "policy": policy and asdict(policy)}).encode()
    return LENGTH.pack(NEW_BATCH + len(text)) + text


@lru_cache
def _read_header(text: bytes) -> tuple[int, ImagePolicy | None]:
    content = json.loads(text)
    return content["memory"], content["policy"] and ImagePolicy(**content["policy"])


def main() -> None:
    """Serve until stdin ends."""
    options = DecoderOptions.from_json(sys.argv[1])
    for name in ("resize", "pack"):
        native_library(name)  # compiling them is nothing that an image's time or memory pays for
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(4)  # an engine on the same CPUs works with threads in step: a core taken from one of them stops them all
    memories = [_SharedMemory(int(descriptor)) for descriptor in sys.argv[2:]]
    memory, used, policy = memories[0], 0, options.policy
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while (length := _read_length(sys.stdin.buffer)) is not None:
        if length >= NEW_BATCH:
            number, asked = _read_header(sys.stdin.buffer.read(length - NEW_BATCH))
            memory, used, policy = memories[number], 0, asked or options.policy
            continue
        answer, tiles = _decode(sys.stdin.buffer.read(length), options, policy)
        if tiles is not None:
            memory.write(used, tiles)
            used += tiles.pixels.nbytes
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _decode(data: bytes, options: DecoderOptions, policy: ImagePolicy) -> tuple[dict[str, Any], Tiles | None]:
    answer: dict[str, Any] = {"num_bytes": 0}
    if options.with_sha256:
        answer["sha256"] = hashlib.sha256(data).hexdigest()
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
