"""Whatever is done to an output after the job has finished, `verify` finds it and names the file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import SCHEMA, commit, finish, row, write_output

from jobs.verify import Report, verify
from pipeline.commit import write_commit
from pipeline.errors import ConfigError
from pipeline.manifest import ROWS_PER_SHARD
from pipeline.storage import Location

INPUTS = ROWS_PER_SHARD + 100  # two shards
PER_FILE = 400
ERRORS = {3: "truncated", 500: "truncated", 900: "empty"}
COUNTS = {"inputs": INPUTS, "rows": INPUTS, "ok": INPUTS - 3, "error": 3, "missing": 0, "duplicate": 0, "unreadable": 0}
CODES = {"empty": 1, "truncated": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("original") / "out"
    return folder, write_output(Location(str(folder)), INPUTS, PER_FILE, ERRORS)


class Output:
    """A copy of a finished output that a test may damage."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    @property
    def location(self) -> Location:
        return Location(str(self.folder))

    def file(self, index: int) -> Path:
        return self.folder / "data" / self.names[index]

    def rewrite(self, index: int, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Change rows of a file and write it with the footer it had, as somebody with pyarrow would."""
        table = pq.read_table(self.file(index))
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), self.file(index))

    def check(self) -> Report:
        return verify(str(self.folder))

    def found(self) -> list[tuple[str, str]]:
        """The kinds of problems and their files, by the file's place in the output where it is one of the job's."""
        report = self.check()
        assert report.passed == (report.problems == ())
        places = {name: str(index) for index, name in enumerate(self.names)}
        return sorted((problem.kind, places.get(problem.file, problem.file)) for problem in report.problems)


@pytest.fixture
def output(original: tuple[Path, list[str]], tmp_path: Path) -> Output:
    shutil.copytree(original[0], tmp_path / "out")
    return Output(tmp_path / "out", original[1])


def test_what_a_job_has_written_passes(output: Output) -> None:
    report = output.check()
    assert report.passed
    assert report.to_json() == {**COUNTS, "errors_by_code": CODES, "problems": []}
    assert report.to_text().splitlines()[-1] == "every input has exactly one row"


def test_a_dropped_file(output: Output) -> None:
    output.file(0).unlink()
    report = output.check()
    assert (report.missing, report.rows, report.duplicate) == (PER_FILE, INPUTS - PER_FILE, 0)
    assert output.found() == [("dropped", "0"), ("totals", "_SUCCESS.json")]
    assert report.to_text().splitlines()[-1] == "NOT complete"


def test_a_doubled_file(output: Output) -> None:
    shutil.copy(output.file(1), output.folder / "data" / "copy.parquet")
    assert output.check().duplicate == PER_FILE
    assert output.found() == [("added", "copy.parquet"), ("name", "copy.parquet"), ("totals", "_SUCCESS.json")]


def test_rows_that_a_second_file_holds_too(output: Output) -> None:
    name = commit(output.location, [row(n, f"s3://bucket/photos/{n}.jpg") for n in (5, 6)])
    assert (output.check().duplicate, output.check().missing) == (2, 0)
    assert output.found() == [("added", name), ("totals", "_SUCCESS.json")]


def test_a_file_under_another_name(output: Output) -> None:
    output.file(2).rename(output.folder / "data" / "renamed.parquet")
    assert output.found() == [("added", "renamed.parquet"), ("dropped", "2"), ("name", "renamed.parquet")]


def dropped(rows: list[dict[str, Any]]) -> None:
    del rows[7]


def doubled(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[7])


def doubled_for_another(rows: list[dict[str, Any]]) -> None:
    rows[7] = rows[8]


def another_text(rows: list[dict[str, Any]]) -> None:
    rows[7]["caption"]["text"] += "."


def another_uri(rows: list[dict[str, Any]]) -> None:
    rows[7]["uri"] = "s3://elsewhere/x.jpg"


def swapped_inputs(rows: list[dict[str, Any]]) -> None:
    rows[7]["uri"], rows[8]["uri"] = rows[8]["uri"], rows[7]["uri"]


def another_version(rows: list[dict[str, Any]]) -> None:
    rows[7]["etag"] = None


def error_called_ok(rows: list[dict[str, Any]]) -> None:
    rows[3]["status"] = "ok"


def neither(rows: list[dict[str, Any]]) -> None:
    rows[7]["status"] = "pending"


def no_answer(rows: list[dict[str, Any]]) -> None:
    rows[7]["ocr"] = None


def beyond_the_manifest(rows: list[dict[str, Any]]) -> None:
    rows[7] |= {"shard_id": 7, "row": 0}


def negative(rows: list[dict[str, Any]]) -> None:
    rows[7]["row"] = -1


CHANGED, TOTALS, FOOTER = ("changed", "0"), ("totals", "_SUCCESS.json"), ("footer", "0")
TAMPERED: dict[str, tuple[Callable[[list[dict[str, Any]]], None], list[tuple[str, str]], tuple[int, int]]] = {
    "a row dropped": (dropped, [CHANGED, FOOTER, TOTALS], (1, 0)),
    "a row doubled": (doubled, [CHANGED, TOTALS], (0, 1)),
    "a row doubled in place of another": (doubled_for_another, [CHANGED, FOOTER], (1, 1)),
    "a text changed": (another_text, [CHANGED], (0, 0)),
    "an address changed": (another_uri, [CHANGED, ("input", "0")], (0, 0)),
    "addresses swapped": (swapped_inputs, [CHANGED, ("input", "0")], (0, 0)),
    "a version dropped": (another_version, [CHANGED, ("input", "0")], (0, 0)),
    "an error called ok": (error_called_ok, [CHANGED, ("status", "0"), TOTALS], (0, 0)),
    "neither ok nor error": (neither, [CHANGED, ("status", "0"), TOTALS], (0, 0)),
    "an answer dropped": (no_answer, [CHANGED, ("status", "0")], (0, 0)),
    "a row beyond the manifest": (beyond_the_manifest, [CHANGED, FOOTER], (1, 1)),
    "a negative row": (negative, [CHANGED, FOOTER], (1, 1)),
}


@pytest.mark.parametrize(("change", "problems", "counts"), TAMPERED.values(), ids=TAMPERED)
def test_changed_rows_are_found(
    output: Output,
    change: Callable[[list[dict[str, Any]]], None],
    problems: list[tuple[str, str]],
    counts: tuple[int, int],
) -> None:
    output.rewrite(0, change)
    assert output.found() == sorted(problems)
    assert (output.check().missing, output.check().duplicate) == counts


def test_what_the_digest_cannot_tell_is_found_without_it(output: Output) -> None:
    """Somebody who also writes digests anew is found by what the rows say."""
    for change in (another_uri, no_answer, doubled):
        output.rewrite(0, change)
    finish(output.location, INPUTS)
    assert output.found() == [("input", "0"), ("status", "0")]
    assert output.check().duplicate == 1


@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9, -1])
def test_a_cut_file_is_unreadable_and_its_rows_are_missing(output: Output, kept: float) -> None:
    data = output.file(1).read_bytes()
    output.file(1).write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    report = output.check()
    assert (report.missing, report.rows, report.unreadable) == (PER_FILE, INPUTS - PER_FILE, 1)
    assert output.found() == [("changed", "1"), ("totals", "_SUCCESS.json"), ("unreadable", "1")]


def test_any_byte_that_flips_is_found(output: Output) -> None:
    data, rng = output.file(2).read_bytes(), random.Random(0)
    for place in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
        output.file(2).write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        assert ("changed", "2") in output.found()
    output.file(2).write_bytes(data)
    assert output.found() == []


def test_a_file_of_another_job(output: Output) -> None:
    path = output.file(0)
    table = pq.read_table(path)
    path.unlink()
    write_commit(output.location, table.replace_schema_metadata(None), ROWS_PER_SHARD, {"smolvlm.fingerprint": "0"})
    finish(output.location, INPUTS)
    assert output.found() == [("fingerprint", "0")]


@pytest.mark.parametrize("other", ["more columns", "fewer columns", "other types"])
def test_a_file_with_other_columns_does_not_count(output: Output, other: str) -> None:
    table = pq.read_table(output.file(0))
    if other == "more columns":
        table = table.append_column("mood", pa.nulls(table.num_rows, pa.string()))
    elif other == "fewer columns":
        table = table.drop_columns(["ocr"])
    else:
        table = table.set_column(8, "num_tiles", table["num_tiles"].cast(pa.int64()))
    pq.write_table(table, output.file(0))
    report = output.check()
    assert (report.unreadable, report.missing) == (1, PER_FILE)
    assert ("schema", "0") in output.found()


def test_foreign_files(output: Output) -> None:
    pq.write_table(pa.table({"x": [1, 2]}), output.folder / "data" / "other.parquet")
    (output.folder / "data" / "notes.txt").write_text("not a data file")
    (output.folder / "data" / ".half.parquet").write_bytes(b"PAR1")
    assert output.found() == [("added", "other.parquet"), ("schema", "other.parquet")]


def test_a_job_that_has_not_finished(output: Output) -> None:
    (output.folder / "_SUCCESS.json").unlink()
    assert output.found() == [("unfinished", "_SUCCESS.json")]
    assert not output.check().passed


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {"x": {}}}'])
def test_a_broken_account_of_the_end(output: Output, text: str) -> None:
    (output.folder / "_SUCCESS.json").write_text(text)
    assert output.found() == [("unreadable", "_SUCCESS.json")]


@pytest.mark.parametrize("key", ["tasks", "seed"])
def test_a_job_that_was_changed_afterwards(output: Output, key: str) -> None:
    path = output.folder / "_job.json"
    content = json.loads(path.read_text())
    content["job"][key] = 7 if key == "seed" else [{**task, "temperature": 0.5} for task in content["job"]["tasks"]]
    path.write_text(json.dumps(content))
    assert output.found() == [("job", "_job.json")]
    assert key in output.check().problems[0].detail


def test_a_manifest_that_was_changed_afterwards(output: Output) -> None:
    (path,) = (output.folder / "_manifest").glob("*.parquet")
    table = pq.read_table(path)
    uris = ["s3://elsewhere/0.jpg", *table["uri"].to_pylist()[1:]]
    pq.write_table(table.set_column(2, table.schema.field("uri"), pa.array(uris)), path)
    assert output.found() == [("input", "0")]


def test_many_problems_are_cut_for_people_alone(output: Output) -> None:
    for number in range(30):
        (output.folder / "data" / f"{number}.parquet").write_bytes(b"x")
    text = output.check().to_text()
    assert "and 40 more problems; --json lists all" in text  # each is added and unreadable
    assert len(output.check().to_json()["problems"]) == 60


def test_nothing_written_is_all_missing(tmp_path: Path) -> None:
    write_output(Location(str(tmp_path)), 10, 5)
    shutil.rmtree(tmp_path / "data")
    report = verify(str(tmp_path))
    assert (report.rows, report.missing, report.passed) == (0, 10, False)


def test_on_s3_as_on_disk(s3: str) -> None:
    destination = Location("s3://test/verify", s3)
    names = write_output(destination, 30, 10)
    assert verify(destination.uri, s3).passed
    file = destination.child("data").child(names[0])
    file.put(file.read()[:-1])
    assert {problem.file for problem in verify(destination.uri, s3).problems} == {"_SUCCESS.json", names[0]}


def test_no_manifest_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no complete manifest"):
        verify(str(tmp_path / "nothing"))


def test_the_schema_is_the_one_under_test() -> None:
    assert [SCHEMA.field(index).name for index in (2, 8)] == ["shard_id", "format"]
