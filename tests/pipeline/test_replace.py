"""Replacing error rows: readers see every image exactly once, whenever they look and whatever is killed."""

import contextlib
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from replacing import MANIFEST, ROWS, ROWS_PER_SHARD, fence, is_bad, stage, table, write_first

from pipeline import ranges
from pipeline.commit import data_directory, read_commits, write_commit
from pipeline.errors import LeaseLost, PipelineError
from pipeline.finish import read_success, read_totals, write_success
from pipeline.lease import Fence
from pipeline.replace import find_errors, merged, replace_errors, waiting
from pipeline.storage import Location

SCRIPT = Path(__file__).parents[1] / "support" / "replacing.py"
_names = itertools.count()
Read = Callable[[Location], pa.Table]


@pytest.fixture(params=["file", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "file":
        return Location(str(tmp_path / "out"))
    return Location(f"s3://test/replace-{next(_names)}", request.getfixturevalue("s3"))


@pytest.fixture
def written(destination: Location) -> Location:
    write_first(destination)
    write_success(destination, read_totals(destination, read_commits(destination, ROWS_PER_SHARD)), ROWS, 1.0)
    return destination


def read_at_once(file: Location) -> pa.Table:
    """As a reader does who fetches the object."""
    return pq.read_table(pa.BufferReader(file.read()))


def read_in_parts(file: Location) -> pa.Table:
    """As a reader does who asks for the footer, then for columns; a file that was replaced meanwhile is read again."""
    for _ in range(20):
        with contextlib.suppress(OSError), file.open(block_size=1 << 10) as handle:
            return pq.read_table(handle, pre_buffer=False)
    raise AssertionError("the file was replaced twenty times while it was read")


def rows_seen(destination: Location, read: Read = read_at_once) -> dict[str, str]:
    """List `data/` and read it; return who made each image's row. Fails on a row twice or of two makers."""
    files = [info.uri for info in data_directory(destination).list() if info.uri.endswith(".parquet")]
    rows = pa.concat_tables([read(destination.at(uri)) for uri in files]).to_pylist()
    for row in rows:
        texts = {row["sha256"], row["caption"]["text"] if row["status"] == "ok" else row["error"]["message"]}
        assert len(texts) == 1, "the columns of one row are of two versions"
        assert (row["error"] is None) == (row["status"] == "ok")
    found = {row["uri"]: row["sha256"] for row in rows}
    assert len(rows) == len(found), "an image has two rows"
    assert set(found) == {f"u{n}" for n in range(ROWS)}, "an image has no row"
    return found


def names(destination: Location) -> dict[str, int]:
    return {c.name: ranges.count(c.rows) for c in read_commits(destination, ROWS_PER_SHARD)}


def test_error_rows_give_way_and_nothing_else_changes(written: Location) -> None:
    before, times = names(written), [c.committed_at for c in read_commits(written, ROWS_PER_SHARD)]
    stage(written, "second", ok=True)
    assert replace_errors(written, MANIFEST, fence(written)) == 80
    assert rows_seen(written) == {f"u{n}": "second" if is_bad(n) else "first" for n in range(ROWS)}
    assert names(written) == before
    assert [c.committed_at for c in read_commits(written, ROWS_PER_SHARD)] == times
    assert read_commits(waiting(written), ROWS_PER_SHARD) == []
    assert read_success(written) is None
    found = find_errors(written, MANIFEST, None)
    assert (len(found.pending), found.hopeless, found.total) == (0, 0, 0)


def test_nothing_waiting_changes_nothing(written: Location) -> None:
    success = read_success(written)
    assert success is not None
    assert replace_errors(written, MANIFEST, fence(written)) == 0
    assert read_success(written) == success


def test_errors_are_found_by_code_and_those_of_the_listing_left_alone(tmp_path: Path) -> None:
    destination = Location(str(tmp_path))
    rows = table(range(30), "x").to_pylist()
    rows[3]["error"]["code"] = "not_found"
    rows[6]["error"] |= {"code": "archive_truncated", "stage": "list"}
    rows[9]["error"] |= {"code": "not_found", "stage": "list"}
    for part in (rows[:7], rows[7:]):
        write_commit(destination, pa.Table.from_pylist(part, schema=table([], "x").schema), ROWS_PER_SHARD, {})
    found = find_errors(destination, MANIFEST, None)
    assert found.pending.tolist() == [[n, n + 1] for n in (0, 3, 12, 15, 18, 21, 24, 27)]
    assert (found.hopeless, found.total) == (2, 10)
    found = find_errors(destination, MANIFEST, frozenset({"not_found"}))
    assert (found.pending.tolist(), found.hopeless, found.total) == ([[3, 4]], 1, 10)
    found = find_errors(destination, MANIFEST, frozenset({"empty"}))
    assert (found.pending.tolist(), found.hopeless, found.total) == ([], 0, 10)


def test_only_error_rows_are_replaced_once_and_only_by_rows_of_the_file() -> None:
    old = table([4, 3, 1, 0], "old").replace_schema_metadata({"k": "v"})
    new = pa.concat_tables([table([0, 1, 6, 9], "new", ok=True), table([0, 3], "newer", ok=True)])
    found = merged(old, new, ROWS_PER_SHARD)
    assert list(zip(found["uri"].to_pylist(), found["sha256"].to_pylist(), strict=True)) == [
        ("u0", "new"),
        ("u1", "old"),
        ("u3", "newer"),
        ("u4", "old"),
    ]
    assert found.schema.equals(old.schema, check_metadata=True)
    assert merged(old, new.slice(0, 0), ROWS_PER_SHARD).equals(merged(old, table([1, 9], "x"), ROWS_PER_SHARD))


def test_what_a_forgotten_worker_left_cannot_undo_a_row_that_is_ok(written: Location) -> None:
    stage(written, "second", ok=True)
    replace_errors(written, MANIFEST, fence(written))
    stage(written, "late")
    replace_errors(written, MANIFEST, fence(written))
    assert set(rows_seen(written).values()) == {"first", "second"}
    assert read_commits(waiting(written), ROWS_PER_SHARD) == []


@pytest.mark.parametrize("read", [read_at_once, read_in_parts])
def test_readers_see_every_image_once_all_the_time(written: Location, read: Read) -> None:
    stop, failures, seen = threading.Event(), list[BaseException](), Counter[str]()

    def look() -> None:
        try:
            while not stop.is_set():
                seen.update(rows_seen(written, read).values())
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 6
    for turn in itertools.count():
        stage(written, f"turn {turn}")
        replace_errors(written, MANIFEST, fence(written))
        if failures or (time.monotonic() > deadline and len(seen) > 3):
            break
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert set(rows_seen(written).values()) == {"first", f"turn {turn}"}


@contextlib.contextmanager
def replacer(destination: Location, name: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, str(SCRIPT), destination.uri, destination.endpoint_url or "", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # one round is through
        yield process
        process.send_signal(signal.SIGKILL)


def test_kills_at_random_moments_leave_every_image_once_and_the_next_ends_it(written: Location) -> None:
    rng = random.Random(0)
    unfinished = 0
    for kill in range(8):
        with replacer(written, f"kill {kill}"):
            time.sleep(rng.random() * 0.5)
        rows_seen(written)
        unfinished += bool(read_commits(waiting(written), ROWS_PER_SHARD))
    assert unfinished, "no kill hit a replacement under way"
    stage(written, "last", ok=True)  # over what the last kill left waiting
    replace_errors(written, MANIFEST, fence(written))
    stage(written, "last", ok=True)
    replace_errors(written, MANIFEST, fence(written))
    assert rows_seen(written) == {f"u{n}": "last" if is_bad(n) else "first" for n in range(ROWS)}
    assert read_commits(waiting(written), ROWS_PER_SHARD) == []


class Meddler(Fence):
    """Stands where the lease is asked, between reading the file and writing it, and changes the file."""

    def check(self) -> None:
        (info,) = data_directory(self.directory).list()
        file = self.directory.at(info.uri)
        file.put(file.read() + b" ")


def test_a_file_that_somebody_else_changes_meanwhile_is_left_to_them(destination: Location) -> None:
    write_commit(destination, table(range(ROWS), "first"), ROWS_PER_SHARD, {})
    stage(destination, "second")
    with pytest.raises(PipelineError, match="was changed by somebody else"):
        replace_errors(destination, MANIFEST, Meddler(destination, 1))
    (info,) = data_directory(destination).list()
    assert destination.at(info.uri).read().endswith(b"PAR1 ")
    assert read_commits(waiting(destination), ROWS_PER_SHARD)


def test_a_driver_that_has_lost_its_lease_replaces_nothing(written: Location) -> None:
    stage(written, "second")
    written.child("_lease").child("000002.json").put(b"{}")
    with pytest.raises(LeaseLost):
        replace_errors(written, MANIFEST, fence(written))
    assert set(rows_seen(written).values()) == {"first"}
    assert read_commits(waiting(written), ROWS_PER_SHARD)


def test_replace_of_one_object(destination: Location) -> None:
    file = destination.child("x")
    file.put(b"one")
    first = file.info()
    assert first is not None
    assert first.etag is not None
    assert file.replace(b"two!", first.etag)
    assert file.read() == b"two!"
    assert not file.replace(b"three", first.etag)
    assert file.read() == b"two!"
    file.delete()
    assert not file.replace(b"four", first.etag)
    assert file.info() is None


def test_an_answer_that_was_lost_counts_as_written(s3: str) -> None:
    file = Location("s3://test/replace-lost/x", s3)
    file.put(b"one")
    first = file.info()
    assert first is not None
    assert first.etag is not None
    assert file.replace(b"two", first.etag)
    assert file.replace(b"two", first.etag)  # what a second attempt meets


def test_an_object_of_many_parts_is_replaced_in_one_request(s3: str) -> None:
    file = Location("s3://test/replace-large/x", s3)
    file.put(b"one")
    first = file.info()
    assert first is not None
    assert first.etag is not None
    data = bytes(101 << 20)
    assert file.replace(data, first.etag)
    assert file.read() == data
