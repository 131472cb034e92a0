"""Decoding where its death costs nothing: in a child process. An image that ends it three times is set aside."""

import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedRWPair

from pipeline.decode_process import LENGTH, READY, DecoderOptions, batch_header
from pipeline.decoder_child import MAX_STARTS, DecoderChild, Prepared, TileMemory, does_not_start
from pipeline.errors import RowError
from smolvlm.image import ImagePolicy

MAX_CRASHES = 3
_AHEAD = 8  # images in the socket beyond the one being decoded: enough to hide the switch between processes


class Decoder:
    """One child process, started again whenever it dies. One batch at a time; `close` ends the child.

    An image that ends the child three times is quarantined.
    """

    def __init__(self, options: DecoderOptions) -> None:
        self._options = options
        self._memory = TileMemory()
        self._lock = threading.Lock()
        self._child: DecoderChild | None = None
        self._stream: BufferedRWPair | None = None

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
                tiles.append(self._memory.read(sum(answer.num_bytes for answer in answers)))
                done += answers
                crashes = crashes + 1 if not answers else 1
                if signal_number is not None and crashes == MAX_CRASHES:
                    done.append(Prepared(error=_quarantined(signal_number, self._options)))
                    crashes = 0
            return done, b"".join(tiles)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()
            self._memory.close()

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._child.pid if self._child else None

    def _attempt(self, images: Sequence[bytes], policy: ImagePolicy | None) -> tuple[list[Prepared], int | None]:
        """Decode in order until all are done or the child dies; return the answers and what it died of."""
        if self._child is not None and not self._child.is_alive:
            self._stop()  # it died idle, of nothing that these images did
        stream = self._stream or self._start()
        answers: list[Prepared] = []
        with suppress(ConnectionError):
            stream.write(batch_header(policy))
            for index, image in enumerate(images):
                stream.write(LENGTH.pack(len(image)))
                stream.write(image)
                stream.flush()
                if index >= _AHEAD and not _collect(stream, answers):
                    break
        while len(answers) < len(images) and _collect(stream, answers):
            pass
        if len(answers) == len(images):
            return answers, None
        return answers, -self._stop()

    def _start(self) -> BufferedRWPair:
        for _ in range(MAX_STARTS):
            self._child = DecoderChild(self._options, [self._memory])
            self._stream = self._child.socket.makefile("rwb")
            if _line(self._stream) == READY:
                return self._stream
            exit_code = self._stop()
        raise does_not_start(exit_code)

    def _stop(self) -> int:
        """End the child, if there is one, and return its exit code."""
        child, stream, self._child, self._stream = self._child, self._stream, None, None
        if child is None or stream is None:
            return 0
        with suppress(OSError):  # it may hold a part of an image that nobody will read
            stream.close()
        return child.end()


def _collect(stream: BufferedRWPair, answers: list[Prepared]) -> bool:
    """Read one answer; False once the child has died."""
    line = _line(stream)
    if not line.endswith(b"\n"):
        return False
    answers.append(Prepared.from_line(line))
    return True


def _line(stream: BufferedRWPair) -> bytes:
    """What the child says next; less than a line if it has died. Its socket is reset where it left images unread."""
    with suppress(ConnectionError):
        return stream.readline()
    return b""


def _quarantined(signal_number: int, options: DecoderOptions) -> RowError:
    if signal_number == signal.SIGALRM:
        cause = f"it took longer than image.timeout_s = {options.timeout_s:g}"
    elif signal_number > 0:
        cause = f"{signal.Signals(signal_number).name}"
    else:
        cause = f"exit code {-signal_number}"
    message = f"this image ended its decoder {MAX_CRASHES} times ({cause}); it is not tried again"
    return RowError("quarantined", "prepare", message, MAX_CRASHES)
