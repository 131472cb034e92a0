from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import Report, verify
from pipeline.errors import ConfigError
from pipeline.manifest import ROWS_PER_SHARD, write_manifest
from pipeline.records import ERROR_TYPE, MANIFEST_SCHEMA
from pipeline.storage import Location

INPUTS = ROWS_PER_SHARD + 100  # two shards
Rows = Sequence[int]


def data_table(rows: Rows, errors: dict[int, str]) -> pa.Table:
    failed = [{"code": errors[n], "stage": "read", "message": "", "attempts": 1} if n in errors else None for n in rows]
    return pa.table(
        {
            "uri": [f"s3://b/{n}.jpg" for n in rows],
            "shard_id": pa.array([n // ROWS_PER_SHARD for n in rows], pa.int32()),
            "row": pa.array([n % ROWS_PER_SHARD for n in rows], pa.int32()),
            "status": ["error" if n in errors else "ok" for n in rows],
            "error": pa.array(failed, ERROR_TYPE),
            "caption": [f"text of {n} " * 5 for n in rows],
        }
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A destination whose manifest has INPUTS rows and whose data/ is empty."""
    names = {"uri": [f"s3://b/{n}.jpg" for n in range(INPUTS)], "kind": ["object"] * INPUTS}
    columns = [pa.array(names.get(field.name, [None] * INPUTS), field.type) for field in MANIFEST_SCHEMA]
    numbers = [
        pa.array([0] * INPUTS, pa.int32()) if f.name in ("shard_id", "row") else c
        for f, c in zip(MANIFEST_SCHEMA, columns, strict=True)
    ]
    write_manifest(Location(str(tmp_path)), [pa.table(numbers, schema=MANIFEST_SCHEMA)])
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def put(output: Path) -> Callable[..., Path]:
    def write(name: str, rows: Rows, errors: dict[int, str] | None = None) -> Path:
        path = output / "data" / f"{name}.parquet"
        pq.write_table(data_table(rows, errors or {}), path, row_group_size=100)
        return path

    return write


def report(**changes: object) -> dict[str, object]:
    """The report of a whole output, with changes."""
    whole = {"inputs": INPUTS, "rows": INPUTS, "ok": INPUTS, "error": 0, "missing": 0, "duplicate": 0, "unreadable": 0}
    return {**whole, "errors_by_code": {}, **changes}


def checked(output: Path) -> Report:
    found = verify(str(output))
    assert found.passed == (not (found.missing or found.duplicate or found.unreadable))
    return found


def test_a_whole_output_passes(output: Path, put: Callable[..., Path]) -> None:
    put("a", range(700))
    put("b", range(700, INPUTS), {701: "truncated", 702: "truncated", 900: "empty"})
    found = checked(output)
    assert found.passed
    assert found.to_json() == report(ok=INPUTS - 3, error=3, errors_by_code={"empty": 1, "truncated": 2})


def test_nothing_written_is_all_missing(output: Path) -> None:
    assert checked(output).to_json() == report(rows=0, ok=0, missing=INPUTS)


def test_dropped_rows(output: Path, put: Callable[..., Path]) -> None:
    put("a", [n for n in range(INPUTS) if n not in (0, 500, INPUTS - 1)])
    assert checked(output).to_json() == report(rows=INPUTS - 3, ok=INPUTS - 3, missing=3)


def test_doubled_rows_in_one_file_and_over_files(output: Path, put: Callable[..., Path]) -> None:
    put("a", [*range(INPUTS), 5, 5])
    put("b", [5, 6])
    assert checked(output).to_json() == report(rows=INPUTS + 4, ok=INPUTS + 4, duplicate=4)


def test_a_doubled_row_does_not_hide_a_missing_one(output: Path, put: Callable[..., Path]) -> None:
    put("a", [*range(1, INPUTS), 7])
    assert checked(output).to_json() == report(missing=1, duplicate=1)


def test_rows_outside_the_manifest_are_beyond_what_inputs_owe(output: Path, put: Callable[..., Path]) -> None:
    put("a", range(INPUTS))
    put("b", [INPUTS, 10 * INPUTS])
    assert checked(output).to_json() == report(rows=INPUTS + 2, ok=INPUTS + 2, duplicate=2)


def test_negative_and_null_numbers_are_outside(output: Path, put: Callable[..., Path]) -> None:
    put("a", range(INPUTS))
    strange = data_table([0, 1, 2], {}).set_column(2, "row", pa.array([-1, None, ROWS_PER_SHARD], pa.int32()))
    pq.write_table(strange, output / "data" / "b.parquet")
    assert checked(output).duplicate == 3


@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9, -1])
def test_a_cut_file_is_unreadable_and_its_rows_are_missing(output: Path, put: Callable[..., Path], kept: float) -> None:
    put("a", range(600))
    cut = put("b", range(600, INPUTS))
    data = cut.read_bytes()
    cut.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    found = checked(output)
    assert found.to_json() == report(rows=600, ok=600, missing=INPUTS - 600, unreadable=1)
    assert found.unreadable_files == (str(cut),)


def test_damage_to_any_column_shows(output: Path, put: Callable[..., Path]) -> None:
    path = put("a", range(INPUTS))
    group = pq.read_metadata(path).row_group(3)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "caption")
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert checked(output).unreadable == 1


def test_foreign_files(output: Path, put: Callable[..., Path]) -> None:
    put("a", range(INPUTS))
    pq.write_table(pa.table({"x": [1, 2]}), output / "data" / "other.parquet")
    (output / "data" / "notes.txt").write_text("not a data file")
    (output / "data" / ".half.parquet").write_bytes(b"PAR1")
    found = checked(output)
    assert found.to_json() == report(unreadable=1)
    assert found.unreadable_files == (str(output / "data" / "other.parquet"),)


def test_a_row_that_is_neither_ok_nor_error_fails(output: Path, put: Callable[..., Path]) -> None:
    put("a", range(1, INPUTS))
    row = data_table([0], {})
    changed = row.set_column(row.schema.get_field_index("status"), "status", pa.array(["pending"]))
    pq.write_table(changed, output / "data" / "b.parquet")
    assert not verify(str(output)).passed


def test_no_manifest_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no complete manifest"):
        verify(str(tmp_path / "nothing"))
