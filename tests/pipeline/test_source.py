"""Sources: every object of every kind becomes rows, in order, and what cannot be opened is a row with an error."""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import tar_of

from pipeline import source as module
from pipeline.archive import image_column
from pipeline.errors import ConfigError
from pipeline.job import Source
from pipeline.source import InputBatch, input_batches, kind_of, manifest_tables
from pipeline.storage import Location, ObjectInfo

Row = dict[str, Any]


def rows(source: Source) -> list[Row]:
    return [row for table in manifest_tables(source) for row in table.to_pylist()]


def brief(found: list[Row], root: Path | str = "") -> list[tuple[str, str | None, str, str | None]]:
    """Return (uri below the root, member, kind, error code) of each row."""
    return [(r["uri"].removeprefix(f"{root}/"), r["member"], r["kind"], r["error_code"]) for r in found]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def write_tar(path: Path, *names: str) -> None:
    path.write_bytes(tar_of((name, name.encode()) for name in names))


def write_parquet(path: Path, rows: int, column: str = "image", **more: pa.Array) -> None:
    pq.write_table(pa.table({column: pa.array([b"x"] * rows, pa.binary()), **more}), path)


class TestPrefixes:
    """A directory or a bucket prefix."""

    def test_each_object_is_taken_by_its_own_kind(self, tmp_path: Path) -> None:
        write(tmp_path, "a/1.JPG", "a/2.webp", "b/by-hash", "notes.txt", "table.xlsx", "c.heic")
        write_tar(tmp_path / "d.tar", "0.png", "0.json", ".hidden.png", "sub/1.jpeg")
        write_parquet(tmp_path / "e.parquet", 3)
        found = rows(Source(str(tmp_path)))
        assert sorted(brief(found, tmp_path), key=str) == [
            ("a/1.JPG", None, "object", None),
            ("a/2.webp", None, "object", None),
            ("b/by-hash", None, "object", None),
            ("c.heic", None, "object", None),
            ("d.tar", "0.png", "tar", None),
            ("d.tar", "sub/1.jpeg", "tar", None),
            ("e.parquet", "0", "parquet", None),
            ("e.parquet", "1", "parquet", None),
            ("e.parquet", "2", "parquet", None),
        ]
        by_name = {Path(r["uri"]).name: r for r in found}
        assert by_name["1.JPG"]["size"] == len("a/1.JPG")
        assert by_name["1.JPG"]["etag"]
        content = (tmp_path / "d.tar").read_bytes()
        members = {r["member"]: content[r["offset"] : r["offset"] + r["size"]] for r in found if r["kind"] == "tar"}
        assert members == {"0.png": b"0.png", "sub/1.jpeg": b"sub/1.jpeg"}

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("images", {"a.jpg"}), ("webdataset", {"b.tar"}), ("parquet", {"c.parquet"})],
    )
    def test_a_format_takes_its_kind_only(
        self, tmp_path: Path, kind: Literal["images", "webdataset", "parquet"], expected: set[str]
    ) -> None:
        write(tmp_path, "a.jpg")
        write_tar(tmp_path / "b.tar", "1.jpg")
        write_parquet(tmp_path / "c.parquet", 2)
        assert {name for name, *_ in brief(rows(Source(str(tmp_path), kind)), tmp_path)} == expected

    def test_hidden_files_are_left_out_unless_named(self, tmp_path: Path) -> None:
        write(tmp_path, "a.jpg", ".b.jpg", "_c/d.jpg", ".git/e.jpg", "f/_g.jpg")
        assert {name for name, *_ in brief(rows(Source(str(tmp_path))), tmp_path)} == {"a.jpg"}
        found = rows(Source(str(tmp_path), glob="_c/*.jpg"))
        assert {name for name, *_ in brief(found, tmp_path)} == {"_c/d.jpg"}

    @pytest.mark.parametrize("hidden", ["plain", ".cache", "_data"])
    def test_one_object_is_a_source_wherever_it_lies(self, tmp_path: Path, hidden: str) -> None:
        write(tmp_path / hidden, "a.jpg")
        write_tar(tmp_path / hidden / "b.tar", "1.jpg")
        for name, member in (("a.jpg", None), ("b.tar", "1.jpg")):
            (row,) = rows(Source(str(tmp_path / hidden / name)))
            assert (row["uri"], row["member"]) == (str(tmp_path / hidden / name), member)

    @pytest.mark.parametrize(
        ("glob", "expected"),
        [
            ("*.jpg", {"a.jpg"}),
            ("**/*.jpg", {"a.jpg", "x/b.jpg", "x/y/c.jpg"}),
            ("x/*", {"x/b.jpg"}),
            ("**/[bc].*", {"x/b.jpg", "x/y/c.jpg", "x/y/c.png"}),
            ("nothing/*", set()),
        ],
    )
    def test_globs_as_a_field_and_in_the_uri(self, tmp_path: Path, glob: str, expected: set[str]) -> None:
        write(tmp_path, "a.jpg", "x/b.jpg", "x/y/c.jpg", "x/y/c.png")
        for source in (
            Source(str(tmp_path), glob=glob),
            Source(f"{tmp_path}/{glob}"),
            Source(f"file://{tmp_path}/{glob}"),
        ):
            found = {r["uri"].removeprefix("file://").removeprefix(f"{tmp_path}/") for r in rows(source)}
            assert found == expected

    def test_s3_in_the_order_of_the_store(self, s3: str) -> None:
        root = Location("s3://test/source-order", s3)
        for name in ("b.jpg", "a/2.jpg", "a/10.jpg", "_x.jpg"):
            root.child(name).put(b"x")
        found = rows(Source(root.uri, endpoint_url=s3))
        assert [r["uri"] for r in found] == [f"{root.uri}/{n}" for n in ("a/10.jpg", "a/2.jpg", "b.jpg")]

    def test_a_missing_bucket_is_a_config_error(self, s3: str) -> None:
        with pytest.raises(ConfigError, match=r"source.uri s3://no-such-bucket/x.*Check the address"):
            rows(Source("s3://no-such-bucket/x/", endpoint_url=s3))


class TestTars:
    """WebDataset shards."""

    def test_duplicate_keys_are_flagged_after_the_first(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", "1.jpg", "2.jpg", "1.jpg", "1.png")
        (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
        found = brief(rows(Source(str(tmp_path))), tmp_path)
        one = [("1.jpg", None), ("2.jpg", None), ("1.jpg", "duplicate_key"), ("1.png", None)]
        assert [(name, member, code) for name, member, _, code in found] == [
            (name, member, code) for name in ("a.tar", "b.tar") for member, code in one
        ]

    def test_a_cut_archive_keeps_what_came_before(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "whole.tar", "1.jpg", "2.jpg", "3.jpg")
        data = (tmp_path / "whole.tar").read_bytes()
        (tmp_path / "whole.tar").unlink()
        (tmp_path / "at-border.tar").write_bytes(data[:2048])
        (tmp_path / "inside.tar").write_bytes(data[: 2048 + 512 + 3])
        assert brief(rows(Source(str(tmp_path))), tmp_path) == [
            ("at-border.tar", "1.jpg", "tar", None),
            ("at-border.tar", "2.jpg", "tar", None),
            ("at-border.tar", None, "tar", "archive_truncated"),
            ("inside.tar", "1.jpg", "tar", None),
            ("inside.tar", "2.jpg", "tar", None),
            ("inside.tar", "3.jpg", "tar", "truncated"),
            ("inside.tar", None, "tar", "archive_truncated"),
        ]

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "A.TAR.XZ"])
    def test_compressed_archives_are_refused_with_a_remedy(self, tmp_path: Path, name: str) -> None:
        write(tmp_path, name)
        (row,) = rows(Source(str(tmp_path)))
        assert (row["kind"], row["error_code"]) == ("tar", "unsupported_format")
        assert "store plain .tar" in row["error_message"]

    def test_other_bytes_are_one_row(self, tmp_path: Path) -> None:
        write(tmp_path, "a.tar")
        (tmp_path / "b.tar").write_bytes(b"")
        assert [code for *_, code in brief(rows(Source(str(tmp_path))))] == ["archive_invalid", "archive_invalid"]


class TestParquet:
    """Files with image bytes."""

    def test_rows_are_indices_over_row_groups(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table({"image": pa.array([b"x"] * 7, pa.large_binary())}), tmp_path / "a.parquet", row_group_size=3
        )
        found = rows(Source(str(tmp_path)))
        assert [(r["member"], r["offset"]) for r in found] == [(str(i), i) for i in range(7)]

    def test_broken_files_are_one_row_each(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", 3)
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "b.parquet").write_bytes(data[:-10])
        (tmp_path / "c.parquet").write_bytes(b"")
        pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "d.parquet")
        found = rows(Source(str(tmp_path)))
        assert [(Path(r["uri"]).name, r["error_code"]) for r in found] == [
            *[("a.parquet", None)] * 3,
            *[(f"{name}.parquet", "parquet_invalid") for name in "bcd"],
        ]
        assert "among ['label']" in found[-1]["error_message"]

    BINARY = pa.binary()
    STRUCT = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

    @pytest.mark.parametrize(
        ("fields", "column", "expected"),
        [
            ({"image": STRUCT, "label": pa.int64()}, None, "image"),
            ({"scan": pa.large_binary(), "text": pa.string()}, None, "scan"),
            ({"image": BINARY, "mask": BINARY}, None, "image"),
            ({"image": BINARY, "mask": STRUCT}, "mask", "mask"),
            ({"jpg": BINARY, "embedding": BINARY}, None, "jpg"),
        ],
    )
    def test_the_image_column_is_found_by_type_and_name(
        self, fields: dict[str, pa.DataType], column: str | None, expected: str
    ) -> None:
        assert image_column(pa.schema(fields), column) == expected

    @pytest.mark.parametrize(
        ("fields", "column", "message"),
        [
            ({"a": BINARY, "b": BINARY}, None, r"no single image column .* among \['a', 'b'\]"),
            ({"image": BINARY, "png": BINARY}, None, r"no single image column"),
            ({"image": pa.string()}, None, r"no single image column"),
            ({"image": BINARY}, "pixels", r"no image column 'pixels' .*Name it with source.column"),
            ({"image": BINARY, "text": pa.string()}, "text", r"no image column 'text'"),
            ({"image": pa.struct([pa.field("path", pa.string())])}, None, r"no single image column"),
        ],
    )
    def test_what_cannot_be_told_is_refused_by_name(
        self, fields: dict[str, pa.DataType], column: str | None, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            image_column(pa.schema(fields), column)


class TestLists:
    """CSV, JSONL and Parquet files that name objects."""

    def write(self, path: Path, uris: list[str], column: str = "uri") -> str:
        if path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["id", column])
                writer.writeheader()
                writer.writerows({"id": i, column: uri} for i, uri in enumerate(uris))
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"id": i, column: uri}) + "\n\n" for i, uri in enumerate(uris)))
        else:
            pq.write_table(pa.table({"id": range(len(uris)), column: uris}), path)
        return str(path)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    @pytest.mark.parametrize("column", ["uri", "url", "photo, or not"])
    def test_each_row_is_an_input_in_order(self, tmp_path: Path, suffix: str, column: str) -> None:
        write_tar(tmp_path / "t.tar", "1.jpg", "2.jpg")
        uris = ["s3://b/1.jpg", "s3://b/a, b.jpg", "gs://x/ü?.php", str(tmp_path / "t.tar"), "s3://b/1.jpg"]
        path = self.write(tmp_path / f"list.{suffix}", uris, column)
        found = rows(Source(path, "list", column=column if "," in column else None))
        assert sorted((r["uri"], r["member"] or "") for r in found) == sorted(
            [(uri, "") for uri in uris if "tar" not in uri] + [(uris[3], "1.jpg"), (uris[3], "2.jpg")]
        )
        assert {r["size"] for r in found if r["kind"] == "object"} == {None}

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_a_list_is_known_by_its_name_and_drops_no_row(self, tmp_path: Path, suffix: str) -> None:
        uris = ["s3://b/1.jpg", "s3://b/image.php", "s3://b/scan.dat", "s3://b/_hidden.jpg"]
        found = rows(Source(self.write(tmp_path / f"list.{suffix}", uris)))
        assert [r["uri"] for r in found] == uris

    def test_a_relative_name_lies_beside_its_list(self, tmp_path: Path) -> None:
        uris = ["1.jpg", "sub/2.jpg", "/absolute/3.jpg", "s3://b/4.jpg"]
        found = [r["uri"] for r in rows(Source(self.write(tmp_path / "list.csv", uris)))]
        assert found == [f"{tmp_path}/1.jpg", f"{tmp_path}/sub/2.jpg", "/absolute/3.jpg", "s3://b/4.jpg"]

    def test_a_spreadsheet_s_byte_order_mark_is_no_part_of_the_column(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfuri,id\r\ns3://b/1.jpg,1\r\n")
        assert [r["uri"] for r in rows(Source(str(tmp_path / "list.csv")))] == ["s3://b/1.jpg"]

    def test_a_prefix_of_lists(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.csv", ["s3://b/1.jpg"])
        self.write(tmp_path / "b.jsonl", ["s3://b/2.jpg"])
        self.write(tmp_path / "c.parquet", ["s3://b/3.jpg"])
        assert [r["uri"] for r in rows(Source(str(tmp_path), "list"))] == [f"s3://b/{i}.jpg" for i in (1, 2, 3)]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_a_missing_column_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = self.write(tmp_path / f"list.{suffix}", ["s3://b/1.jpg"])
        with pytest.raises(ConfigError, match=r"no column 'photo' among \['id', 'uri'\]. Name it with source.column"):
            rows(Source(path, "list", column="photo"))

    def test_no_column_that_looks_like_uris(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "list.csv", ["s3://b/1.jpg"], "photo")
        with pytest.raises(ConfigError, match="no column 'uri' or 'url' or"):
            rows(Source(path))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"uri": "s3://b/1.jpg"}\n{"uri": ', "JSONDecodeError"),
            ("a.jsonl", b'{"uri": "s3://b/1.jpg"}\n{"url": "x"}', "a row has no 'uri'"),
            ("a.jsonl", b'"s3://b/1.jpg"\n', "not an object"),
            ("a.csv", b"uri\n\xff\xfe\n", "UnicodeDecodeError"),
            ("a.parquet", b"not parquet", "ArrowInvalid"),
        ],
    )
    def test_a_broken_list_is_a_config_error(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            rows(Source(str(tmp_path / name), "list"))

    def test_a_null_in_a_parquet_list_is_no_uri(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"uri": ["s3://b/1.jpg", None]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match="a row has no 'uri'"):
            rows(Source(str(tmp_path / "a.parquet"), "list"))

    def test_a_list_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nothing\.csv"):
            rows(Source(str(tmp_path / "nothing.csv")))


class TestStreams:
    """A million objects do not sit in the driver."""

    class Endless(fsspec.AbstractFileSystem):  # type: ignore[misc]
        """A store that counts how much of its listing was asked for."""

        protocol = "endless"
        asked = 0

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": path, "type": "directory", "size": 0}

        def walk(self, path: str, **_: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
            for folder in itertools.count():
                names = [f"{path}/{folder:09d}/{i:03d}.jpg" for i in range(1000)]
                type(self).asked += 1000
                yield f"{path}/{folder}", {}, {name: {"name": name, "size": 1, "type": "file"} for name in names}

    def test_a_listing_is_read_as_far_as_it_is_used(self) -> None:
        fsspec.register_implementation("endless", self.Endless, clobber=True)
        source = Source("endless://store")
        tables = manifest_tables(source)
        taken = sum(next(tables).num_rows for _ in range(10))
        assert taken == 20_000
        assert self.Endless.asked <= 101_000

    def test_objects_go_in_batches_and_archives_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_OBJECTS_PER_BATCH", 3)
        names = ["1.jpg", "2.jpg", "a.tar", "3.jpg", "4.jpg", "b.parquet", "x.txt"]
        monkeypatch.setattr(Location, "list", lambda _: iter([ObjectInfo(f"memory://s/{n}", 1, "e") for n in names]))
        monkeypatch.setattr(Location, "info", lambda _: None)
        batches: list[InputBatch] = list(input_batches(Source("memory://s"), Location("memory://s")))
        assert [(b.kind, [o.uri.rpartition("/")[2] for o in b.objects]) for b in batches] == [
            ("tar", ["a.tar"]),
            ("object", ["1.jpg", "2.jpg", "3.jpg"]),
            ("parquet", ["b.parquet"]),
            ("object", ["4.jpg"]),
        ]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/a.jpg", "object"),
        ("s3://b/a.tar", "tar"),
        ("s3://b.tar/a", "object"),
        ("/data/a.PARQUET", "parquet"),
        ("s3://b/a.json", None),
        ("https://h/a.jpg?size=big.txt", "object"),
    ],
)
def test_kinds_by_name(uri: str, expected: str | None) -> None:
    assert kind_of(uri, Source("s3://b")) == expected
