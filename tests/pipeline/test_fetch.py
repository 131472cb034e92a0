"""Fetching: few requests, right bytes, and each thing that cannot be read is its own row's error."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from tars import tar_of

from pipeline import storage
from pipeline.errors import RowError
from pipeline.fetch import Fetched, Fetcher
from pipeline.job import Source
from pipeline.records import ImageRef
from pipeline.source import manifest_tables
from pipeline.storage import Location

MAX_BYTES = 1 << 20


def refs(source: Source) -> list[ImageRef]:
    rows = [row for table in manifest_tables(source) for row in table.to_pylist()]
    return [ImageRef(shard_id=0, row=i, **row) for i, row in enumerate(rows)]


def fetch(source: Source, wanted: list[ImageRef] | None = None, max_bytes: int = MAX_BYTES) -> list[Fetched]:
    return Fetcher(source, max_bytes).fetch(refs(source) if wanted is None else wanted)


def codes(found: list[Fetched]) -> list[str | None]:
    return [item.code if isinstance(item, RowError) else None for item in found]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(tar_of(members.items()))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int | None]]:
    """The ranges of all reads from here on."""
    seen: list[tuple[int | None, int | None]] = []
    original = Location.read

    def recorded(self: Location, start: int | None = None, stop: int | None = None) -> bytes:
        seen.append((start, stop))
        return original(self, start, stop)

    monkeypatch.setattr(Location, "read", recorded)
    return seen


Requests = list[tuple[int | None, int | None]]


def test_mixed_kinds_come_back_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"object a")
    write_tar(tmp_path / "b.tar", {"1.jpg": b"one", "x.txt": b"text", "2.jpg": b"two", "0.jpg": b""})
    pq.write_table(pa.table({"image": [b"row 0", b"row 1"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jpg").write_bytes(b"object d")
    source = Source(str(tmp_path))
    all_refs = refs(source)
    by_key = {(Path(ref.uri).name, ref.member): item for ref, item in zip(all_refs, fetch(source), strict=True)}
    assert by_key == {
        ("a.jpg", None): b"object a",
        ("b.tar", "1.jpg"): b"one",
        ("b.tar", "2.jpg"): b"two",
        ("b.tar", "0.jpg"): b"",
        ("c.parquet", "0"): b"row 0",
        ("c.parquet", "1"): b"row 1",
        ("d.jpg", None): b"object d",
    }
    some = all_refs[::2] + all_refs[1::3]
    assert fetch(source, some) == [by_key[Path(ref.uri).name, ref.member] for ref in some]
    assert fetch(source, []) == []


class TestTars:
    """Members of an archive."""

    def test_neighbours_share_a_request(self, tmp_path: Path, reads: Requests) -> None:
        write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"%d" % i * 500 for i in range(40)})
        assert fetch(Source(str(tmp_path))) == [b"%d" % i * 500 for i in range(40)]
        assert len(reads) == 1

    def test_a_gap_that_costs_more_than_a_request_is_not_read(self, tmp_path: Path, reads: Requests) -> None:
        members = {
            "1.jpg": b"1" * 100,
            "a.bin": bytes(200_000),
            "2.jpg": b"2" * 100,
            "b.bin": bytes(20_000),
            "3.jpg": b"3",
        }
        write_tar(tmp_path / "a.tar", members)
        assert fetch(Source(str(tmp_path))) == [b"1" * 100, b"2" * 100, b"3"]
        assert len(reads) == 2
        assert sum((stop or 0) - (start or 0) for start, stop in reads) < 25_000

    def test_flaws_known_from_the_listing_cost_no_request(self, tmp_path: Path, reads: Requests) -> None:
        write_tar(tmp_path / "a.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 600, "3.jpg": b"3" * 600})
        data = (tmp_path / "a.tar").read_bytes()
        (tmp_path / "a.tar").write_bytes(data[: 1536 + 1536 + 512 + 100])
        found = fetch(Source(str(tmp_path)))
        assert found[:2] == [b"1" * 600, b"2" * 600]
        assert codes(found[2:]) == ["truncated", "archive_truncated"]
        assert max(stop or 0 for _, stop in reads) <= 1536 + 1536

    def test_a_tar_that_shrank_since_it_was_listed(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"%d" % i * 600 for i in range(4)})
        source = Source(str(tmp_path))
        wanted = refs(source)
        os.truncate(tmp_path / "a.tar", wanted[2].offset or 0)
        found = fetch(source, wanted)
        assert found[:2] == [b"0" * 600, b"1" * 600]
        assert codes(found[2:]) == ["truncated", "truncated"]

    def test_a_member_that_is_too_large_leaves_its_neighbours(self, tmp_path: Path, reads: Requests) -> None:
        write_tar(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": bytes(3_000_000), "3.jpg": b"3"})
        found = fetch(Source(str(tmp_path)))
        assert (found[0], found[2]) == (b"1", b"3")
        assert codes(found) == [None, "too_many_bytes", None]
        assert sum((stop or 0) - (start or 0) for start, stop in reads) < 100_000

    def test_a_deleted_tar_is_an_error_of_each_row(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": b"2", "1.png": b""})
        source = Source(str(tmp_path))
        wanted = refs(source)
        (tmp_path / "a.tar").unlink()
        assert codes(fetch(source, wanted)) == ["not_found"] * 3


class TestObjects:
    """One object, one image."""

    def test_gone_changed_and_too_large(self, tmp_path: Path, reads: Requests) -> None:
        for name in ("changed", "fine", "gone", "large"):
            (tmp_path / name).write_bytes(b"12345")
        (tmp_path / "large").write_bytes(bytes(MAX_BYTES + 1))
        source = Source(str(tmp_path))
        wanted = sorted(refs(source), key=lambda ref: ref.uri)
        (tmp_path / "gone").unlink()
        (tmp_path / "changed").write_bytes(b"1234567")
        found = fetch(source, wanted)
        assert codes(found) == ["changed", None, "not_found", "too_many_bytes"]
        assert isinstance(found[0], RowError)
        assert "7 bytes now, 5 when it was listed" in found[0].message
        assert len(reads) == 3  # the large one is refused by its listed size

    def test_of_a_list_no_more_than_the_limit_is_read(self, tmp_path: Path, reads: Requests) -> None:
        contents = {"a": b"", "b": b"x" * 99, "c": b"x" * 100, "d": b"x" * 101, "e": b"x" * 5000}
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"uri": str(tmp_path / n)}) for n in contents))
        found = fetch(Source(str(tmp_path / "list.jsonl")), max_bytes=100)
        assert found[:3] == [b"", b"x" * 99, b"x" * 100]
        assert codes(found[3:]) == ["too_many_bytes", "too_many_bytes"]
        assert set(reads) == {(0, 101)}

    def test_on_s3_with_empty_and_missing_objects_of_a_list(self, s3: str) -> None:
        root = Location("s3://test/fetch", s3)
        contents = {"a.jpg": b"aaa", "empty.jpg": b"", "b.jpg": b"b" * 200}
        for name, data in contents.items():
            root.child(name).put(data)
        names = ["b.jpg", "gone.jpg", "empty.jpg", "a.jpg"]
        root.child("list.csv").put("\n".join(["uri", *(f"{root.uri}/{name}" for name in names)]).encode())
        source = Source(f"{root.uri}/list.csv", endpoint_url=s3)
        found = fetch(source)
        assert codes(found) == [None, "not_found", None, None]
        assert [found[i] for i in (0, 2, 3)] == [b"b" * 200, b"", b"aaa"]


class Troubled(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that forbids some objects and fails on others."""

    protocol = "troubled"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("troubled://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self.calls.append(path)
        if "forbidden" in path:
            raise PermissionError("403")
        if "broken" in path or ("flaky" in path and self.calls.count(path) < 3):
            raise ConnectionResetError("reset by peer")
        if "bug" in path:
            raise RuntimeError("the library's own")
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def troubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    register_implementation("troubled", Troubled, clobber=True)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.0)
    Troubled.calls.clear()
    yield Location("troubled://place")
    Troubled.store.clear()


def test_stores_that_refuse_and_fail(troubled: Location) -> None:
    for name in ("a.jpg", "broken.jpg", "bug.jpg", "flaky.jpg", "forbidden.jpg"):
        troubled.child(name).put(name.encode())
    found = fetch(Source(troubled.uri))
    assert codes(found) == [None, "read_failed", "read_failed", None, "forbidden"]
    assert (found[0], found[3]) == (b"a.jpg", b"flaky.jpg")
    assert all("troubled://" in item.message for item in found if isinstance(item, RowError))
    assert Troubled.calls.count("/place/broken.jpg") == storage.MAX_ATTEMPTS
    assert Troubled.calls.count("/place/forbidden.jpg") == 1
    assert isinstance(found[1], RowError)
    assert found[1].attempts == storage.MAX_ATTEMPTS


class TestParquet:
    """Image columns."""

    @pytest.fixture
    def groups(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The row groups that were read from here on."""
        seen: list[int] = []
        original: Callable[..., pa.Table] = pq.ParquetFile.read_row_group

        def recorded(self: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
            seen.append(group)
            return original(self, group, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
        return seen

    def test_each_row_group_is_read_once(self, tmp_path: Path, groups: list[int]) -> None:
        pq.write_table(
            pa.table({"label": range(50), "image": [b"%d" % i for i in range(50)]}),
            tmp_path / "a.parquet",
            row_group_size=8,
        )
        source = Source(str(tmp_path))
        wanted, fetcher = refs(source), Fetcher(source, MAX_BYTES)
        found = [item for start in range(0, 50, 5) for item in fetcher.fetch(wanted[start : start + 5])]
        assert found == [b"%d" % i for i in range(50)]
        assert groups == list(range(7))

    def test_two_calls_at_once_read_it_once_too(self, tmp_path: Path, groups: list[int]) -> None:
        pq.write_table(pa.table({"image": [b"%d" % i for i in range(40)]}), tmp_path / "a.parquet", row_group_size=20)
        source = Source(str(tmp_path))
        wanted, fetcher = refs(source), Fetcher(source, MAX_BYTES)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda start: fetcher.fetch(wanted[start : start + 5]), range(0, 40, 5)))
        assert [item for part in parts for item in part] == [b"%d" % i for i in range(40)]
        assert sorted(groups) == [0, 1]

    def test_structs_nulls_and_sizes(self, tmp_path: Path) -> None:
        kind = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
        cells = [
            {"bytes": b"1", "path": "1.jpg"},
            {"bytes": None, "path": "2.jpg"},
            None,
            {"bytes": b"x" * 101},
            {"bytes": b""},
        ]
        pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "a.parquet")
        found = fetch(Source(str(tmp_path)), max_bytes=100)
        assert codes(found) == [None, "empty", "empty", "too_many_bytes", None]
        assert (found[0], found[4]) == (b"1", b"")

    def test_a_damaged_row_group_costs_its_own_rows_and_one_round_of_retries(
        self, tmp_path: Path, groups: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.0)
        path = tmp_path / "a.parquet"
        pq.write_table(
            pa.table({"image": [b"%d" % i * 50 for i in range(30)]}), path, row_group_size=10, use_dictionary=False
        )
        offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
        data = bytearray(path.read_bytes())
        data[offset : offset + 40] = b"\xff" * 40
        path.write_bytes(data)
        found = fetch(Source(str(tmp_path)))
        assert codes(found) == [None] * 10 + ["read_failed"] * 10 + [None] * 10
        assert groups.count(1) <= storage.MAX_ATTEMPTS

    def test_a_deleted_file(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "a.parquet")
        source = Source(str(tmp_path))
        wanted = refs(source)
        (tmp_path / "a.parquet").unlink()
        assert codes(fetch(source, wanted)) == ["not_found", "not_found"]
