"""The decoding child process as its parent has it: a socket to talk through, and the memory where it leaves tiles."""

import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from pipeline.decode_process import DecoderOptions
from pipeline.errors import PipelineError, RowError
from smolvlm.image import UInt8

# For glibc in the child: a picture's memory serves the next one. Fresh pages took a third of the time of a small one.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
_PATIENCE_S = 1.0
MAX_STARTS = 3


@dataclass(frozen=True)
class Prepared:
    """One decoded image: `num_bytes` of the batch's tile bytes are its own, or `error` says why there are none."""

    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    num_tiles: int | None = None
    rows: int = 0
    cols: int = 0
    num_bytes: int = 0
    error: RowError | None = None

    @classmethod
    def from_line(cls, line: bytes) -> "Prepared":
        """Read the child's answer."""
        answer = json.loads(line)
        code, message = answer.pop("code", None), answer.pop("message", "")
        return cls(**answer, error=RowError(code, "prepare", message) if code else None)


class TileMemory:
    """Memory that one child after the other writes tiles into, from the start again for every batch."""

    def __init__(self) -> None:
        self._file = _memory_file()
        self._map: mmap.mmap | None = None

    def fileno(self) -> int:
        """The descriptor, for the child."""
        return self._file.fileno()

    def read(self, size: int) -> bytes:
        """Copy what the last batch left."""
        return self._mapped(size)[:size] if size else b""

    def lend(self, size: int, returned: Callable[["TileMemory"], None]) -> UInt8:
        """Show what the last batch left. `returned` is called once nothing that was made of the array looks at it."""
        lent = np.frombuffer(self._mapped(size), np.uint8, size)  # numpy's views all hold on to this very object
        weakref.finalize(lent, returned, self)
        return lent

    def close(self) -> None:
        """Give it back, as soon as nothing that was lent is in use."""
        self._map = None
        self._file.close()

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        return self._map


class DecoderChild:
    """A child that was just started; it says READY on `socket` when it takes images."""

    def __init__(self, options: DecoderOptions, memories: Sequence[TileMemory]) -> None:
        self.socket, theirs = socket.socketpair()
        shared = [memory.fileno() for memory in memories]
        command = [sys.executable, "-m", "pipeline.decode_process", options.to_json(), *map(str, shared)]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), pass_fds=shared, env=_environment()
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def end(self, patience_s: float = _PATIENCE_S) -> int:
        """Reap it, killing it if it does not end within so many seconds, and return its exit code."""
        self.socket.close()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience_s)
        self._process.kill()
        return self._process.wait()


def does_not_start(exit_code: int) -> PipelineError:
    """What to raise after MAX_STARTS children that ended before they were READY."""
    return PipelineError(
        f"the decoder process does not start (exit code {exit_code}); its output is in the worker's log"
    )


def _environment() -> dict[str, str]:
    """Ray's workers extend sys.path at run time; the child must find the same packages."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        **_KEPT_MEMORY,
    }


def _memory_file() -> BinaryIO:
    """Return memory as a file. Not one in /dev/shm: containers give that 64 MB, and a write beyond kills the writer."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tiles", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Or the child could pull it from under its reader.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return os.fdopen(descriptor, "w+b")
    return tempfile.TemporaryFile()
