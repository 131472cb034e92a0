"""The manifest: numbered once, complete or not there at all, read back by ranges."""

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import manifest as module
from pipeline import ranges
from pipeline.manifest import ROWS_PER_SHARD, Manifest, load_manifest, read_rows, write_manifest
from pipeline.records import MANIFEST_SCHEMA
from pipeline.storage import Location

_SCHEMA = pa.schema([field for field in MANIFEST_SCHEMA if field.name not in ("shard_id", "row")])


def table(first: int, rows: int) -> pa.Table:
    """Return inputs `first` to `first + rows`, told apart by their uri."""
    nothing = {"member": None, "etag": None, "offset": None, "error_code": None, "error_message": None}
    return pa.Table.from_pylist(
        [{"uri": f"u{i}", "kind": "object", "size": i, **nothing} for i in range(first, first + rows)], schema=_SCHEMA
    )


def uris(tables: Iterator[pa.Table]) -> list[str]:
    return [uri for part in tables for uri in part["uri"].to_pylist()]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts and row groups without a million rows."""
    monkeypatch.setattr(module, "_ROWS_PER_PART", 1000)
    monkeypatch.setattr(module, "_ROWS_PER_GROUP", 64)


@pytest.fixture
def destination(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


@pytest.mark.usefixtures("small_parts")
def test_rows_are_numbered_through_parts_and_shards(destination: Location) -> None:
    sizes = [1, 999, 700, 0, 800, 3]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = write_manifest(destination, (table(a, n) for a, n in zip(starts, sizes, strict=True)))
    assert (found.rows, found.num_shards, found.rows_per_shard) == (2503, 3, ROWS_PER_SHARD)
    assert [(part.start, part.rows) for part in found.parts] == [(0, 1000), (1000, 1000), (2000, 503)]
    assert load_manifest(destination) == found
    rows = pa.concat_tables(read_rows(destination, found, ranges.complement(ranges.empty(), found.rows)))
    assert rows.schema == MANIFEST_SCHEMA
    assert rows["uri"].to_pylist() == [f"u{i}" for i in range(2503)]
    pairs = zip(rows["shard_id"].to_pylist(), rows["row"].to_pylist(), strict=True)
    assert [shard * ROWS_PER_SHARD + row for shard, row in pairs] == list(range(2503))
    assert max(rows["row"].to_pylist()) == ROWS_PER_SHARD - 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("limit", [1, 999, 1000, 1001, 5000])
def test_a_limit_takes_the_first_rows_and_stops_listing(destination: Location, limit: int) -> None:
    taken: list[int] = []

    def listing() -> Iterator[pa.Table]:
        for i in range(30):
            taken.append(i)
            yield table(i * 100, 100)

    found = write_manifest(destination, listing(), limit)
    assert found.rows == min(limit, 3000)
    assert len(taken) == min(-(-limit // 100), 30)
    assert uris(read_rows(destination, found, ranges.of_rows(range(found.rows)))) == [
        f"u{i}" for i in range(found.rows)
    ]


@pytest.mark.usefixtures("small_parts")
def test_a_listing_that_died_leaves_nothing_that_anyone_reads(destination: Location) -> None:
    def dying() -> Iterator[pa.Table]:
        yield table(500_000, 1500)
        raise ConnectionResetError("listing broke")

    with pytest.raises(ConnectionResetError):
        write_manifest(destination, dying())
    assert load_manifest(destination) is None
    found = write_manifest(destination, [table(0, 10)])
    assert uris(read_rows(destination, found, ranges.of_rows(range(10)))) == [f"u{i}" for i in range(10)]


def test_the_first_complete_manifest_counts(destination: Location) -> None:
    first = write_manifest(destination, [table(0, 10)])
    assert write_manifest(destination, [table(100, 20)]) == first
    assert load_manifest(destination) == first


def test_no_input_is_a_manifest_without_rows(destination: Location) -> None:
    found = write_manifest(destination, [])
    assert found == Manifest(0, ROWS_PER_SHARD, ())
    assert list(read_rows(destination, found, ranges.empty())) == []


@pytest.mark.usefixtures("small_parts")
def test_any_set_of_rows_is_read_in_order_a_group_at_a_time(destination: Location) -> None:
    found = write_manifest(destination, [table(0, 2500)])
    rng = random.Random(0)
    for share in (0.001, 0.02, 0.3, 0.9):
        wanted = [row for row in range(2500) if rng.random() < share]
        tables = list(read_rows(destination, found, ranges.of_rows(wanted)))
        assert uris(iter(tables)) == [f"u{row}" for row in wanted]
        assert all(part.num_rows <= 64 for part in tables)


@pytest.mark.usefixtures("small_parts")
def test_reading_opens_only_the_parts_it_needs(destination: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    found = write_manifest(destination, [table(0, 5000)])
    opened: list[str] = []
    original = Location.read

    def counted(self: Location, start: int | None = None, stop: int | None = None) -> bytes:
        opened.append(self.uri)
        return original(self, start, stop)

    monkeypatch.setattr(Location, "read", counted)
    stream = read_rows(destination, found, ranges.of_rows([1500, 4999]))
    assert next(stream)["uri"].to_pylist() == ["u1500"]
    assert len(opened) == 1
    assert uris(stream) == ["u4999"]
    assert len(opened) == 2


def test_writing_is_a_stream(destination: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_PER_PART", 1000)
    before = pa.total_allocated_bytes()
    peak = 0

    def listing() -> Iterator[pa.Table]:
        nonlocal peak
        for _ in range(100):
            peak = max(peak, pa.total_allocated_bytes() - before)
            yield table(0, 1000)

    found = write_manifest(destination, listing())
    one = table(0, 1000).nbytes
    assert found.rows == 100_000
    assert peak < 20 * one


@pytest.mark.usefixtures("small_parts")
def test_a_task_carries_only_the_parts_that_it_reads(destination: Location) -> None:
    found = write_manifest(destination, [table(0, 4500)])
    wanted = ranges.of_rows([1999, 2000, 3999])
    around = found.around(wanted)
    assert [part.start for part in around.parts] == [1000, 2000, 3000]
    assert (around.rows, around.rows_per_shard) == (found.rows, found.rows_per_shard)
    assert uris(read_rows(destination, around, wanted)) == ["u1999", "u2000", "u3999"]
