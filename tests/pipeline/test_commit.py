"""The commit: name and footer follow from the rows, so a retry changes nothing and nothing else need be written."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ranges
from pipeline.commit import Commit, committed_rows, data_directory, footer_rows, read_commits, write_commit
from pipeline.errors import PipelineError
from pipeline.job import Task
from pipeline.records import output_schema
from pipeline.storage import Location

ROWS_PER_SHARD = 10
SCHEMA = output_schema((Task("caption", "Describe."),))
METADATA = {"smolvlm.job": "receipts", "smolvlm.model": "ünïcode"}


def rows(numbers: list[int]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"uri": f"u{n}", "shard_id": n // ROWS_PER_SHARD, "row": n % ROWS_PER_SHARD, "status": "ok"} for n in numbers],
        schema=SCHEMA,
    )


def numbers(found: ranges.Ranges) -> list[int]:
    return [n for start, stop in found.tolist() for n in range(start, stop)]


@pytest.fixture
def destination(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


def files(destination: Location) -> list[Path]:
    return sorted(Path(destination.uri, "data").iterdir())


def test_a_file_is_sorted_says_its_rows_and_carries_the_metadata(destination: Location) -> None:
    commit = write_commit(destination, rows([25, 3, 9, 10, 4]), ROWS_PER_SHARD, METADATA)
    (path,) = files(destination)
    assert path.name == commit.name
    table = pq.read_table(path)
    assert table["uri"].to_pylist() == ["u3", "u4", "u9", "u10", "u25"]
    assert table.schema.remove_metadata() == SCHEMA
    metadata = pq.read_metadata(path).metadata
    assert numbers(footer_rows(metadata, ROWS_PER_SHARD)) == [3, 4, 9, 10, 25] == numbers(commit.rows)
    assert {key: metadata[key.encode()].decode() for key in METADATA} == METADATA
    assert metadata[b"smolvlm.rows"] == b"[[0,3,5],[0,9,10],[1,0,1],[2,5,6]]"  # (shard, first row, stop row)


def test_a_retry_in_any_order_is_a_no_op(destination: Location) -> None:
    first = write_commit(destination, rows([1, 2, 3]), ROWS_PER_SHARD, METADATA)
    (path,) = files(destination)
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns
    again = write_commit(destination, rows([3, 1, 2]), ROWS_PER_SHARD, {"smolvlm.job": "later"})
    assert again.name == first.name
    assert files(destination) == [path]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, stamp)


def test_names_differ_with_the_rows(destination: Location) -> None:
    names = {write_commit(destination, rows(n), ROWS_PER_SHARD, {}).name for n in ([1], [2], [1, 2], [11], [1, 3])}
    assert len(names) == 5


def test_commits_are_read_back_from_footers_alone(destination: Location) -> None:
    sets = [[0, 1, 2], [5], [7, 8, 19, 20, 21], [40]]
    written = [write_commit(destination, rows(n), ROWS_PER_SHARD, METADATA) for n in sets]
    data_directory(destination).child("notes.txt").put(b"not a commit")
    found = read_commits(destination, ROWS_PER_SHARD)
    assert [commit.name for commit in found] == sorted(commit.name for commit in written)
    assert sorted(numbers(commit.rows) for commit in found) == sets
    assert numbers(committed_rows(found)) == sorted(n for one in sets for n in one)
    assert read_commits(destination.child("elsewhere"), ROWS_PER_SHARD) == []
    assert not len(committed_rows([]))


def test_a_row_twice_in_one_commit_is_refused(destination: Location) -> None:
    with pytest.raises(PipelineError, match="3 rows holds only 2"):
        write_commit(destination, rows([1, 2, 1]), ROWS_PER_SHARD, {})
    assert not Path(destination.uri, "data").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_an_unreadable_file_is_named(destination: Location, damage: str) -> None:
    commit = write_commit(destination, rows([1, 2, 3]), ROWS_PER_SHARD, {})
    write_commit(destination, rows([4]), ROWS_PER_SHARD, {})
    path = Path(destination.uri, "data", commit.name)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"hello" * 100)
    with pytest.raises(PipelineError, match=f"{commit.name} is not a readable commit.*Remove it"):
        read_commits(destination, ROWS_PER_SHARD)


def test_on_s3_as_on_disk(s3: str) -> None:
    destination = Location("s3://test/commits", s3)
    written = [write_commit(destination, rows([n, n + 1]), ROWS_PER_SHARD, METADATA) for n in range(0, 60, 3)]
    assert write_commit(destination, rows([1, 0]), ROWS_PER_SHARD, METADATA).name == written[0].name
    found: list[Commit] = read_commits(destination, ROWS_PER_SHARD)
    assert {c.name: numbers(c.rows) for c in found} == {c.name: numbers(c.rows) for c in written}
