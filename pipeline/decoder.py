"""Decoding where its death costs nothing: in a child process. An image that ends it three times is set aside."""

import contextlib
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.decode_process import LENGTH, READY, DecoderOptions, batch_header
from pipeline.errors import PipelineError, RowError
from smolvlm.image import ImagePolicy

MAX_CRASHES = 3
# For glibc in the child: a picture's memory serves the next one. Fresh pages took a third of the time of a small one.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
_AHEAD = 8  # images in the pipe beyond the one being decoded: enough to hide the switch between processes


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


class Decoder:
    """One child process, started again whenever it dies. One batch at a time; `close` ends the child.

    An image that ends the child `max_crashes` times is quarantined.
    """

    def __init__(self, options: DecoderOptions, max_crashes: int = MAX_CRASHES) -> None:
        self._options = options
        self._max_crashes = max_crashes
        self._shared = _shared_file()
        self._view: mmap.mmap | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self, images: Sequence[bytes], policy: ImagePolicy | None = None) -> tuple[list[Prepared], bytes]:
        """Return what became of each image, and all their tiles' bytes one after the other.

        `policy` replaces that of the options for this batch.
        """
        with self._lock:
            done: list[Prepared] = []
            tiles: list[bytes] = []
            crashes = 0
            while len(done) < len(images):
                answers, signal_number = self._attempt(images[len(done) :], policy)
                tiles.append(self._tile_bytes(answers))
                done += answers
                crashes = crashes + 1 if not answers else 1
                if signal_number is not None and crashes == self._max_crashes:
                    done.append(Prepared(error=_quarantined(signal_number, self._options, self._max_crashes)))
                    crashes = 0
            return done, b"".join(tiles)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()
            if self._view is not None:
                self._view.close()
                self._view = None
            self._shared.close()

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._process.pid if self._process else None

    def _attempt(self, images: Sequence[bytes], policy: ImagePolicy | None) -> tuple[list[Prepared], int | None]:
        """Decode in order until all are done or the child dies; return the answers and what it died of."""
        if self._process is not None and self._process.poll() is not None:
            self._stop()  # it died idle, of nothing that these images did
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        answers: list[Prepared] = []
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(batch_header(policy))
            for index, image in enumerate(images):
                process.stdin.write(LENGTH.pack(len(image)))
                process.stdin.write(image)
                process.stdin.flush()
                if index >= _AHEAD and not _collect(process, answers):
                    break
        while len(answers) < len(images) and _collect(process, answers):
            pass
        if len(answers) == len(images):
            return answers, None
        return answers, -self._stop()

    def _tile_bytes(self, answers: Sequence[Prepared]) -> bytes:
        size = sum(answer.num_bytes for answer in answers)
        if not size:
            return b""
        if self._view is None or len(self._view) < size:
            self._view = mmap.mmap(self._shared.fileno(), 0, prot=mmap.PROT_READ)
        return self._view[:size]

    def _start(self) -> "subprocess.Popen[bytes]":
        for _ in range(MAX_CRASHES):
            process = self._process = self._spawn()
            assert process.stdout is not None
            if process.stdout.readline() == READY:
                return process
            exit_code = self._stop()
        raise PipelineError(
            f"the decoder process does not start (exit code {exit_code}); its output is in the worker's log"
        )

    def _spawn(self) -> "subprocess.Popen[bytes]":
        # Ray's workers extend sys.path at run time; the child must find the same packages.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            **_KEPT_MEMORY,
        }
        descriptor = self._shared.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.decode_process", self._options.to_json(), str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            env=environment,
        )

    def _stop(self) -> int:
        """Reap the child, killing it if it has not ended, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _shared_file() -> BinaryIO:
    """Return memory as a file. Not one in /dev/shm: containers give that 64 MB, and a write beyond kills the writer."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tiles", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Or the child could pull it from under its reader.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return os.fdopen(descriptor, "w+b")
    return tempfile.TemporaryFile()


def _collect(process: "subprocess.Popen[bytes]", answers: list[Prepared]) -> bool:
    """Read one answer; False once the child has died."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        return False
    answers.append(_prepared(json.loads(line)))
    return True


def _prepared(answer: dict[str, Any]) -> Prepared:
    code, message = answer.pop("code", None), answer.pop("message", "")
    return Prepared(**answer, error=RowError(code, "prepare", message) if code else None)


def _quarantined(signal_number: int, options: DecoderOptions, crashes: int) -> RowError:
    if signal_number == signal.SIGALRM:
        cause = f"it took longer than image.timeout_s = {options.timeout_s:g}"
    elif signal_number > 0:
        cause = f"{signal.Signals(signal_number).name}"
    else:
        cause = f"exit code {-signal_number}"
    message = f"this image ended its decoder {crashes} times ({cause}); it is not tried again"
    return RowError("quarantined", "prepare", message, crashes)
