"""The end of a run: overlaps go, totals are those of the files, and no row is missing at any moment."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ranges
from pipeline.commit import committed_rows, read_commits, write_commit
from pipeline.finish import read_totals, resolve_overlaps, write_success
from pipeline.job import Task
from pipeline.manifest import Manifest
from pipeline.records import output_schema
from pipeline.storage import Location

ROWS_PER_SHARD = 10
SCHEMA = output_schema((Task("caption", "Describe."),))


def commit(destination: Location, numbers: list[int], driver: str = "a", bad: tuple[int, ...] = ()) -> str:
    rows = [
        {
            "uri": f"u{n}",
            "shard_id": n // ROWS_PER_SHARD,
            "row": n % ROWS_PER_SHARD,
            "status": "error" if n in bad else "ok",
            "error": {"code": "truncated" if n % 2 else "empty", "stage": "prepare", "message": "x", "attempts": 1}
            if n in bad
            else None,
            "caption": None if n in bad else {"text": f"{driver} {n}"},
        }
        for n in numbers
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return write_commit(destination, table, ROWS_PER_SHARD, {"smolvlm.job": "x"}).name


@pytest.fixture
def destination(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


def stored(destination: Location) -> list[str]:
    tables = [pq.read_table(path) for path in Path(destination.uri, "data").glob("*.parquet")]
    return sorted(uri for table in tables for uri in table["uri"].to_pylist())


def resolve(destination: Location, rows: int) -> list[ranges.Ranges]:
    commits = read_commits(destination, ROWS_PER_SHARD)
    return [c.rows for c in resolve_overlaps(destination, commits, Manifest(rows, ROWS_PER_SHARD, ()))]


def assert_disjoint_and_whole(destination: Location, rows: int) -> None:
    assert stored(destination) == sorted(f"u{n}" for n in range(rows))
    found = read_commits(destination, ROWS_PER_SHARD)
    assert sum(ranges.count(c.rows) for c in found) == rows
    assert committed_rows(found).tolist() == [[0, rows]]


def test_without_overlaps_nothing_is_touched(destination: Location) -> None:
    names = {commit(destination, [0, 1, 2]), commit(destination, [3, 4])}
    before = {path.name: path.stat().st_mtime_ns for path in Path(destination.uri, "data").iterdir()}
    assert len(resolve(destination, 5)) == 2
    assert {path.name: path.stat().st_mtime_ns for path in Path(destination.uri, "data").iterdir()} == before
    assert set(before) == names


@pytest.mark.parametrize(
    "sets",
    [
        [[0, 1, 2, 3], [2, 3, 4, 5]],
        [[0, 1, 2, 3, 4, 5], [1, 2], [4]],
        [[0, 2, 4], [1, 2, 3], [3, 4, 5], [0, 5]],
        [[*range(25)], [*range(5, 31)], [*range(20, 40)]],
    ],
)
def test_overlaps_leave_each_row_once(destination: Location, sets: list[list[int]]) -> None:
    for i, numbers in enumerate(sets):
        commit(destination, numbers, driver=str(i))
    rows = max(map(max, sets)) + 1
    kept = resolve(destination, rows)
    assert sum(map(ranges.count, kept)) == rows
    assert_disjoint_and_whole(destination, rows)
    assert {path.name for path in Path(destination.uri, "data").iterdir()} == {
        c.name for c in read_commits(destination, ROWS_PER_SHARD)
    }


def test_a_crash_between_writing_and_deleting_loses_nothing(
    destination: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, numbers in enumerate([[0, 1, 2, 3], [2, 3, 4, 5], [5, 6, 0]]):
        commit(destination, numbers, driver=str(i))

    def crash(self: Location) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(Location, "delete", crash)
            with pytest.raises(KeyboardInterrupt):
                resolve(destination, 7)
        assert set(stored(destination)) == {f"u{n}" for n in range(7)}
    resolve(destination, 7)
    assert_disjoint_and_whole(destination, 7)


def test_success_has_totals_and_digests_of_what_is_stored(destination: Location) -> None:
    names = [commit(destination, [0, 1, 2, 3], bad=(1, 2)), commit(destination, [4, 5], bad=(5,))]
    files = read_totals(destination, read_commits(destination, ROWS_PER_SHARD))
    assert sum((file.counts for file in files), Counter()) == {
        "ok": 3,
        "error": 3,
        "error.truncated": 2,
        "error.empty": 1,
    }
    write_success(destination, files, 6, 1.5)
    content = json.loads(destination.child("_SUCCESS.json").read())
    digests = {n: hashlib.sha256(Path(destination.uri, "data", n).read_bytes()).hexdigest() for n in names}
    assert content == {
        "inputs": 6,
        "rows": 6,
        "ok": 3,
        "error": 3,
        "errors_by_code": {"truncated": 2, "empty": 1},
        "files": {
            names[0]: {"rows": 4, "sha256": digests[names[0]]},
            names[1]: {"rows": 2, "sha256": digests[names[1]]},
        },
        "elapsed_s": 1.5,
    }
