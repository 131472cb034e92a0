"""Labelled sources: the right text with the right bytes, in one order everywhere, and every bad label named."""

import ast
import csv
import io
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import tar_of

from pipeline.errors import ConfigError, RowError, RowFailure
from pipeline.job import Source
from pipeline.labelled import LabelColumns, LabelledImage, LabelledSource
from pipeline.storage import Location

COUNT = 23
TEXTS = [f"Total {n}.{n:02} €\nsecond line" for n in range(COUNT)]
KINDS = ["receipt" if n % 3 else "word" for n in range(COUNT)]
DEGRADED = [n % 4 == 0 for n in range(COUNT)]
ALL_COLUMNS = LabelColumns(kind="kind", degraded="degraded")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 9), (number, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(COUNT)]


def everything(source: LabelledSource) -> list[LabelledImage]:
    return [source[index] for index in range(len(source))]


def columns() -> dict[str, pa.Array]:
    return {"text": pa.array(TEXTS), "kind": pa.array(KINDS), "degraded": pa.array(DEGRADED)}


def parquet_bytes(table: Mapping[str, object], row_group_size: int = 5) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(table)), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def put(root: str, files: Mapping[str, bytes], endpoint: str | None = None) -> None:
    for name, data in files.items():
        Location(f"{root}/{name}", endpoint).put(data)


def as_parquet(root: str, endpoint: str | None = None) -> Source:
    first = {name: column[:10] for name, column in columns().items()}
    rest = {name: column[10:] for name, column in columns().items()}
    struct = [{"bytes": data, "path": "x.png"} for data in PICTURES[10:]]
    files = {
        "b/1.parquet": parquet_bytes({"photo": pa.array(struct), **rest}),
        "a.parquet": parquet_bytes({"photo": pa.array(PICTURES[:10]), **first}),
    }
    put(root, files, endpoint)
    return Source(root, endpoint_url=endpoint)


def list_rows() -> list[dict[str, object]]:
    places = [f"pictures/{number}.png" for number in range(COUNT)]
    labels = zip(places, TEXTS, KINDS, DEGRADED, strict=True)
    return [{"path": path, "text": text, "kind": kind, "degraded": bad} for path, text, kind, bad in labels]


def jsonl_bytes() -> bytes:
    return "\n".join(json.dumps(row) for row in list_rows()).encode()


def csv_bytes() -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list_rows()[0])
    writer.writeheader()
    writer.writerows(list_rows())
    return buffer.getvalue().encode()


def as_list(name: str, content: Callable[[], bytes]) -> Callable[[str, str | None], Source]:
    def write(root: str, endpoint: str | None = None) -> Source:
        put(root, {f"pictures/{number}.png": data for number, data in enumerate(PICTURES)}, endpoint)
        put(root, {name: content()}, endpoint)
        return Source(f"{root}/{name}", "list" if name.endswith("parquet") else "auto", endpoint_url=endpoint)

    return write


def list_parquet_bytes() -> bytes:
    return parquet_bytes({name: pa.array([row[name] for row in list_rows()]) for name in list_rows()[0]})


WRITERS: dict[str, Callable[[str, str | None], Source]] = {
    "parquet": as_parquet,
    "jsonl": as_list("labels.jsonl", jsonl_bytes),
    "csv": as_list("labels.csv", csv_bytes),
    "parquet-list": as_list("labels.parquet", list_parquet_bytes),
}


def values(found: Sequence[LabelledImage | RowError]) -> list[tuple[bytes, str, str, bool | None]]:
    assert all(isinstance(each, LabelledImage) for each in found), found
    return [(each.data, each.text, each.kind, each.degraded) for each in found if isinstance(each, LabelledImage)]


EXPECTED = list(zip(PICTURES, TEXTS, KINDS, DEGRADED, strict=True))


class TestContents:
    """Bytes, text, kind and condition belong together, whatever holds them."""

    @pytest.mark.parametrize("form", WRITERS)
    def test_local(self, form: str, tmp_path: Path) -> None:
        source = LabelledSource(WRITERS[form](str(tmp_path), None), ALL_COLUMNS)
        assert values(everything(source)) == EXPECTED
        assert values([source[-1]]) == EXPECTED[-1:]
        assert source.text(3) == TEXTS[3]
        shuffled = random.Random(3).choices(range(COUNT), k=60)
        assert values(source.read(shuffled)) == [EXPECTED[index] for index in shuffled]
        with pytest.raises(IndexError):
            source[COUNT]

    @pytest.mark.parametrize("form", WRITERS)
    def test_on_s3(self, form: str, s3: str) -> None:
        source = LabelledSource(WRITERS[form](f"s3://test/labelled-{form}", s3), ALL_COLUMNS)
        assert values(source.read(range(COUNT))) == EXPECTED

    def test_a_tar_in_any_order(self, tmp_path: Path, s3: str) -> None:
        numbers = random.Random(1).sample(range(COUNT), COUNT)
        members: dict[str, bytes] = {"README": b"about", "x/.hidden.txt": b"h"}
        for number in numbers:  # texts before and after their images, and other members beside them
            members |= {
                f"x/{number:02}.json": b"{}",
                f"x/{number:02}.txt": TEXTS[number].encode() + b"\n" * (number % 2),
            }
            members |= {f"x/{number:02}.PNG": PICTURES[number]}
        put(str(tmp_path), {"data.tar": tar_of(members.items())})
        put("s3://test/labelled-tar", {"data.tar": tar_of(members.items())}, s3)
        for root, endpoint in ((str(tmp_path), None), ("s3://test/labelled-tar", s3)):
            source = LabelledSource(Source(root, endpoint_url=endpoint))
            expected = [(PICTURES[number], TEXTS[number], "", None) for number in numbers]
            assert values(source.read(range(COUNT))) == expected
            backwards = range(COUNT - 1, -1, -2)
            assert values(source.read(backwards)) == [expected[index] for index in backwards]

    def test_names_say_which_row(self, tmp_path: Path) -> None:
        source = LabelledSource(as_parquet(str(tmp_path)))
        assert [source[index].name for index in (0, 11)] == [f"{tmp_path}/a.parquet#0", f"{tmp_path}/b/1.parquet#1"]
        assert (source[0].kind, source[0].degraded) == ("", None)

    def test_the_order_is_the_same_in_another_process(self, tmp_path: Path) -> None:
        source = LabelledSource(as_parquet(str(tmp_path)))
        code = (
            "import sys; from pipeline.job import Source; from pipeline.labelled import LabelledSource\n"
            f"source = LabelledSource(Source({str(tmp_path)!r})); print(source.digest); assert 'ray' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == source.digest

    @pytest.mark.parametrize("form", ["parquet", "jsonl"])
    def test_it_travels_to_another_process_after_use(self, form: str, s3: str, tmp_path: Path) -> None:
        source = LabelledSource(WRITERS[form](f"s3://test/labelled-travels-{form}", s3), ALL_COLUMNS)
        assert values([source[4]]) == EXPECTED[4:5]
        (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
        code = (
            "import pickle, sys; source = pickle.load(sys.stdin.buffer)\n"
            "print([(image.data, image.text, image.kind, image.degraded) for image in source])"
        )
        with (tmp_path / "source.pickle").open("rb") as file:
            done = subprocess.run([sys.executable, "-c", code], stdin=file, capture_output=True, text=True, check=True)
        assert ast.literal_eval(done.stdout) == EXPECTED

    def test_the_digest_follows_names_and_labels_and_not_the_place(self, tmp_path: Path) -> None:
        def digest(folder: str, texts: list[str]) -> str:
            table = {"image": pa.array(PICTURES), "text": pa.array(texts)}
            put(f"{tmp_path}/{folder}", {"a.parquet": parquet_bytes(table)})
            return LabelledSource(Source(f"{tmp_path}/{folder}")).digest

        assert digest("here", TEXTS) == digest("there", TEXTS)
        assert digest("here", TEXTS) != digest("swapped", [TEXTS[1], TEXTS[0], *TEXTS[2:]])

    def test_kinds_of_any_type_become_text(self, tmp_path: Path) -> None:
        table = {"image": pa.array(PICTURES[:3]), "text": pa.array(TEXTS[:3]), "year": pa.array([1999, None, 2001])}
        put(str(tmp_path), {"a.parquet": parquet_bytes(table)})
        source = LabelledSource(Source(str(tmp_path)), LabelColumns(kind="year"))
        assert [image.kind for image in everything(source)] == ["1999", "", "2001"]


class TestBadLabels:
    """Everything wrong with the labels is said when the source is opened."""

    @pytest.mark.parametrize("form", WRITERS)
    @pytest.mark.parametrize("wrong", [LabelColumns("txt"), LabelColumns(kind="txt"), LabelColumns(degraded="txt")])
    def test_a_missing_column_is_named_with_those_that_exist(
        self, form: str, wrong: LabelColumns, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"no column 'txt' among \[.*'text', 'kind', 'degraded'\]\. Name the one"):
            LabelledSource(WRITERS[form](str(tmp_path), None), wrong)

    def test_a_missing_image_column(self, tmp_path: Path) -> None:
        as_parquet(str(tmp_path))
        with pytest.raises(
            ConfigError, match=r"no image column 'scan' .* among \['photo', 'text', 'kind', 'degraded'\]"
        ):
            LabelledSource(Source(str(tmp_path), column="scan"))

    @pytest.mark.parametrize("bad", [None, "", " \n"])
    def test_an_empty_text_names_its_row(self, bad: str | None, tmp_path: Path) -> None:
        table = {"image": pa.array(PICTURES[:8]), "text": pa.array([*TEXTS[:6], bad, TEXTS[7]])}
        put(str(tmp_path), {"a.parquet": parquet_bytes(table)})
        with pytest.raises(ConfigError, match=rf"row 6 \({tmp_path}/a\.parquet#6\): its text \('text'\) is empty"):
            LabelledSource(Source(str(tmp_path)))

    def test_an_empty_text_in_a_list_names_its_image(self, tmp_path: Path) -> None:
        (tmp_path / "l.jsonl").write_text('{"uri": "a.png", "text": "x"}\n{"uri": "b.png"}')
        with pytest.raises(ConfigError, match=rf"row 1 \({tmp_path}/b\.png\): its text \('text'\) is empty"):
            LabelledSource(Source(str(tmp_path / "l.jsonl")))

    def test_a_text_that_is_a_number(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"a.parquet": parquet_bytes({"image": pa.array(PICTURES[:2]), "text": pa.array([1, 2])})})
        with pytest.raises(ConfigError, match=r"row 0 .*'text' is 1, no text"):
            LabelledSource(Source(str(tmp_path)))

    def test_a_condition_that_is_neither_true_nor_false(self, tmp_path: Path) -> None:
        (tmp_path / "l.csv").write_text("uri,text,degraded\na.png,x,False\nb.png,y,maybe\n")
        with pytest.raises(ConfigError, match=r"row 1 .*'degraded' is 'maybe'; it must be true or false"):
            LabelledSource(Source(str(tmp_path / "l.csv")), LabelColumns(degraded="degraded"))

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"1.png": b"x"}, r"1\.png is an image without 1\.txt"),
            ({"1.png": b"x", "1.txt": b"a", "2.txt": b"b"}, r"2\.txt is a text without an image"),
            ({"1.png": b"x", "1.jpg": b"y", "1.txt": b"a"}, r"1\.png and 1\.jpg have one key"),
            ({"1.png": b"x", "1.txt": b"\xff\xfe"}, r"1\.txt is no UTF-8 text"),
            ({"1.png": b"x", "1.txt": b"\n"}, r"row 0 .*#1\.png\): its text .* is empty"),
        ],
    )
    def test_tars(self, members: dict[str, bytes], message: str, tmp_path: Path) -> None:
        put(str(tmp_path), {"a.tar": tar_of(members.items())})
        with pytest.raises(ConfigError, match=message):
            LabelledSource(Source(str(tmp_path)))

    def test_a_tar_that_was_cut(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"a.tar": tar_of({"1.png": b"x", "1.txt": b"a"}.items())[:2048]})
        with pytest.raises(ConfigError, match="cut after a whole member; mend the tar"):
            LabelledSource(Source(str(tmp_path)))

    def test_a_tar_has_no_columns(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"a.tar": tar_of({"1.png": b"x", "1.txt": b"a"}.items())})
        with pytest.raises(ConfigError, match="no other columns"):
            LabelledSource(Source(str(tmp_path)), LabelColumns(kind="kind"))

    def test_images_without_texts(self, tmp_path: Path) -> None:
        put(str(tmp_path), {"a.png": PICTURES[0]})
        with pytest.raises(ConfigError, match=r"a\.png is an image without a text"):
            LabelledSource(Source(str(tmp_path)))

    def test_a_list_of_archives(self, tmp_path: Path) -> None:
        (tmp_path / "l.jsonl").write_text('{"uri": "a.tar", "text": "x"}')
        with pytest.raises(ConfigError, match=r"a\.tar is an archive"):
            LabelledSource(Source(str(tmp_path / "l.jsonl")))

    @pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
    def test_a_file_that_is_something_else(self, name: str, tmp_path: Path) -> None:
        put(str(tmp_path), {name: b"something else"})
        with pytest.raises(ConfigError, match=rf"{name}: .*leave it out"):
            LabelledSource(Source(str(tmp_path)))

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "notes.doc").write_text("x")
        with pytest.raises(ConfigError, match="holds no labelled images"):
            LabelledSource(Source(str(tmp_path)))


class TestBadImages:
    """What cannot be read stays an error of its row."""

    def test_a_null_image_names_its_row_and_its_neighbours_are_read(self, tmp_path: Path) -> None:
        table = {"image": pa.array([PICTURES[0], None, PICTURES[2]], pa.binary()), "text": pa.array(TEXTS[:3])}
        put(str(tmp_path), {"a.parquet": parquet_bytes(table)})
        source = LabelledSource(Source(str(tmp_path)))
        first, second, third = source.read([0, 1, 2])
        assert isinstance(second, RowError)
        assert second.code == "empty"
        assert second.message.startswith(f"row 1 ({tmp_path}/a.parquet#1): ")
        assert values([first, third]) == [(PICTURES[n], TEXTS[n], "", None) for n in (0, 2)]
        with pytest.raises(RowFailure, match=r"row 1 \(.*the image is null"):
            source[1]

    def test_an_object_that_is_gone(self, tmp_path: Path) -> None:
        source = LabelledSource(WRITERS["jsonl"](str(tmp_path), None))
        (tmp_path / "pictures" / "4.png").unlink()
        found = source.read(range(COUNT))
        (gone,) = [each for each in found if isinstance(each, RowError)]
        assert gone.code == "not_found"
        assert gone.message.startswith(f"row 4 ({tmp_path}/pictures/4.png): ")
        assert isinstance(found[4], RowError)
