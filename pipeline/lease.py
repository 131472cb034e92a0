"""One driver a destination. A lease is a numbered object; taking over means putting the next number, once.

No store has to compare and swap: `_lease/000007.json` is put only if absent, its owner alone rewrites it as a
heartbeat, and whoever finds a higher number than its own has lost.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from pipeline.errors import LeaseHeld, LeaseLost
from pipeline.storage import Location

HEARTBEAT_S = 10.0
EXPIRY_S = 60.0
_READS_AT_ONCE = 16


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, since when, and when it last said so (seconds since 1970).

    `hourly_cost` is what an hour of its run costs, 0 where the job names no price.
    """

    id: str
    host: str
    boot: str
    pid: int
    started_at: float
    beat_at: float
    hourly_cost: float = 0.0
    released: bool = False

    @property
    def is_gone(self) -> bool:
        """Released, silent for longer than EXPIRY_S, or a process of this very boot of this host that has ended."""
        if self.released or time.time() - self.beat_at > EXPIRY_S:
            return True
        return (self.host, self.boot) == (socket.gethostname(), _boot_id()) and not _is_running(self.pid)


class Lease:
    """Context manager that holds `_lease/` of a destination. Raises LeaseHeld on entry if someone else does."""

    def __init__(self, destination: Location, hourly_cost: float = 0.0) -> None:
        self._directory = destination.child("_lease")
        self._hourly_cost = hourly_cost
        self._started_at = time.time()
        self._id = uuid4().hex
        self._number = 0
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        last = latest(self._directory)
        if last is not None:
            holder = _read(self._directory, last)
            if not holder.is_gone:
                raise LeaseHeld(_held_message(self._directory, holder))
        self._number = (last or 0) + 1
        if not self._object(self._number).put_if_absent(self._content()):
            holder = _read(self._directory, self._number)
            if holder.id != self._id:  # ours, where the store's answer to the first attempt was lost
                raise LeaseHeld(_held_message(self._directory, holder))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost.is_set():
            self._object(self._number).put(self._content(released=True))

    @property
    def fence(self) -> "Fence":
        """What a worker needs to see whether this lease still holds."""
        return Fence(self._directory, self._number)

    @property
    def lost(self) -> bool:
        """Whether the heartbeat has found another driver in charge."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLost if the heartbeat has found another driver in charge."""
        if self.lost:
            raise LeaseLost(f"{self._directory.uri}: another driver took over; see its output")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.fence.check()
                self._object(self._number).put(self._content())
            except LeaseLost:
                self._lost.set()
                return
            except Exception:  # whatever the store's library raises
                continue  # storage is away for the moment: the next beat tries again, and EXPIRY_S allows for some

    def _object(self, number: int) -> Location:
        return _object(self._directory, number)

    def _content(self, released: bool = False) -> bytes:
        who = (self._id, socket.gethostname(), _boot_id(), os.getpid())
        holder = Holder(*who, self._started_at, time.time(), self._hourly_cost, released)
        return json.dumps(asdict(holder)).encode()


@dataclass(frozen=True)
class Fence:
    """Lets a worker refuse to commit for a driver that is no longer in charge."""

    directory: Location
    number: int

    def check(self) -> None:
        """Raise LeaseLost if a later lease exists."""
        found = latest(self.directory)
        if found is not None and found > self.number:
            raise LeaseLost(
                f"{self.directory.uri}: lease {found} was taken by another driver; this one holds {self.number}"
            )


def latest(directory: Location) -> int | None:
    """Return the highest lease number, None if there is none."""
    return max(_numbers(directory), default=None)


def holders(destination: Location) -> list[Holder]:
    """Return who has held the destination, in order: one for every run, the last of them perhaps still at it."""
    directory = destination.child("_lease")
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(lambda number: _read(directory, number), sorted(_numbers(directory))))


def _numbers(directory: Location) -> Iterator[int]:
    names = (info.uri.rpartition("/")[2] for info in directory.list())
    return (int(name.removesuffix(".json")) for name in names if name.endswith(".json") and not name.startswith("."))


def _object(directory: Location, number: int) -> Location:
    return directory.child(f"{number:06d}.json")


def _read(directory: Location, number: int) -> Holder:
    return Holder(**json.loads(_object(directory, number).read()))


def _held_message(directory: Location, holder: Holder) -> str:
    age = time.time() - holder.beat_at
    return (
        f"{directory.uri} is held by process {holder.pid} on {holder.host}, last heard of {age:.0f} s ago. "
        f"Wait for it, stop it, or choose another output; if it is dead, try again in {max(EXPIRY_S - age, 0):.0f} s."
    )


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A killed driver whose parent has not reaped it is a zombie: it will not commit anything.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
