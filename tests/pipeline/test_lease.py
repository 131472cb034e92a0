"""The lease: one driver at a time, and one that has lost knows it before it commits."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

from pipeline import lease as module
from pipeline.errors import LeaseHeld, LeaseLost
from pipeline.lease import Fence, Holder, Lease, latest
from pipeline.storage import Location

_names = itertools.count()


@pytest.fixture(params=["file", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "file":
        return Location(str(tmp_path))
    return Location(f"s3://test/lease-{next(_names)}", request.getfixturevalue("s3"))


def put_holder(destination: Location, number: int, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "id": "someone else",
        "host": "elsewhere",
        "boot": "another boot",
        "pid": 1,
        "started_at": time.time() - 100,
        "beat_at": time.time(),
        "released": False,
    }
    content = json.dumps(fields | changes).encode()
    assert destination.child("_lease").child(f"{number:06d}.json").put_if_absent(content)


def holder(destination: Location, number: int) -> Holder:
    return Holder(**json.loads(destination.child("_lease").child(f"{number:06d}.json").read()))


def test_a_second_driver_is_refused_by_name(destination: Location) -> None:
    with Lease(destination) as first:
        with pytest.raises(LeaseHeld, match=rf"held by process {os.getpid()} on {socket.gethostname()}.*try again in"):
            Lease(destination).__enter__()
        first.fence.check()
        assert not first.lost
        assert latest(destination.child("_lease")) == 1


def test_a_released_lease_is_taken_over(destination: Location) -> None:
    for number in (1, 2, 3):
        with Lease(destination) as lease:
            assert lease.fence.number == number
            assert not holder(destination, number).released
        assert holder(destination, number).released


def test_an_exception_releases_too(destination: Location) -> None:
    with pytest.raises(KeyError), Lease(destination):
        raise KeyError
    assert holder(destination, 1).released


def test_a_silent_holder_expires(destination: Location) -> None:
    put_holder(destination, 1, beat_at=time.time() - module.EXPIRY_S + 5)
    with pytest.raises(LeaseHeld):
        Lease(destination).__enter__()
    put_holder(destination, 2, beat_at=time.time() - module.EXPIRY_S - 1)
    with Lease(destination) as lease:
        assert lease.fence.number == 3


def test_a_dead_process_of_this_host_is_taken_over_at_once(destination: Location) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    here = {"host": socket.gethostname(), "boot": module._boot_id(), "pid": int(dead.stdout)}
    put_holder(destination, 1, **{**here, "boot": "before the reboot"})
    with pytest.raises(LeaseHeld):  # the process id says nothing about another boot: a container, a shared disk
        Lease(destination).__enter__()
    put_holder(destination, 2, **{**here, "pid": os.getpid()})
    with pytest.raises(LeaseHeld):
        Lease(destination).__enter__()
    put_holder(destination, 3, **here)
    with Lease(destination) as lease:
        assert lease.fence.number == 4


def test_a_killed_driver_that_nobody_reaped_counts_as_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert module._is_running(process.pid)
    process.kill()
    wait_for(lambda: not module._is_running(process.pid), 5)
    process.wait()


def test_of_drivers_racing_for_the_next_number_one_wins(destination: Location) -> None:
    put_holder(destination, 1, released=True)
    barrier = threading.Barrier(8)

    def enter(_: int) -> Lease | None:
        barrier.wait()
        try:
            return Lease(destination).__enter__()
        except LeaseHeld:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [lease for lease in pool.map(enter, range(8)) if lease is not None]
    assert [lease.fence.number for lease in winners] == [2]
    winners[0].__exit__(None, None, None)


def test_the_fence_stops_a_driver_that_was_overtaken(destination: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with Lease(destination) as lease:
        lease.fence.check()
        put_holder(destination, 2)
        with pytest.raises(LeaseLost, match=r"lease 2 was taken.*holds 1"):
            lease.fence.check()
        wait_for(lambda: lease.lost, 10)
    assert not holder(destination, 1).released  # it no longer writes anything
    assert not holder(destination, 2).released


def test_the_heartbeat_says_that_the_driver_lives(destination: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with Lease(destination):
        first = holder(destination, 1).beat_at
        wait_for(lambda: holder(destination, 1).beat_at > first, 10)


def test_the_heartbeat_outlives_faults_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EndpointConnectionError(Exception):
        """Like botocore's, not an OSError."""

    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    failures: list[int] = []
    original = Fence.check

    def flaky(self: Fence) -> None:
        if len(failures) < 3:
            failures.append(1)
            raise EndpointConnectionError
        original(self)

    monkeypatch.setattr(Fence, "check", flaky)
    with Lease(Location(str(tmp_path))) as lease:
        first = holder(Location(str(tmp_path)), 1).beat_at
        wait_for(lambda: holder(Location(str(tmp_path)), 1).beat_at > first, 10)
        assert len(failures) == 3
        assert not lease.lost


def test_an_answer_that_was_lost_on_the_way_is_no_second_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store wrote the lease, the answer got lost, and the retry met the driver's own object."""
    original = Location.put_if_absent

    def forgetful(self: Location, data: bytes) -> bool:
        original(self, data)
        return original(self, data)

    monkeypatch.setattr(Location, "put_if_absent", forgetful)
    with Lease(Location(str(tmp_path))) as lease:
        lease.fence.check()
        with pytest.raises(LeaseHeld):
            Lease(Location(str(tmp_path))).__enter__()
