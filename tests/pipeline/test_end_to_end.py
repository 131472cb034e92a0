"""Whole jobs on a real S3 server and a real Ray: every input, good or bad, has one row, and it is the right one."""

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from standin import PixelAnswerer, text_of

from pipeline.commit import footer_rows
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.manifest import load_manifest
from pipeline.ranges import count, union
from pipeline.records import output_schema
from pipeline.run import Summary, run
from pipeline.storage import Location
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, Tiles, decode_image, split_image

CAPTION = Task("caption", "Describe this image.", max_new_tokens=16)
PICKY = Task("ocr", "refuse dark images", max_new_tokens=16)
SAMPLED = Task("mood", "What is the mood?", max_new_tokens=16, temperature=0.7)
MAX_BYTES = 150_000
POLICY = ImagePolicy(upscale=False)
ALL_CODES = {
    *("archive_invalid", "archive_truncated", "duplicate_key", "parquet_invalid", "unsupported_format"),
    *("not_found", "forbidden", "empty", "truncated", "too_many_bytes", "too_many_pixels", "not_an_image"),
    *("decode_failed", "quarantined", "prompt_too_long"),
}
_names = itertools.count()


def noise(seed: int, width: int = 0, height: int = 0, mode: str = "RGB") -> Image.Image:
    """A bright picture like no other."""
    rng = np.random.default_rng(seed)
    width, height = width or int(rng.integers(9, 90)), height or int(rng.integers(9, 90))
    image = Image.fromarray(rng.integers(100, 256, (height, width, 3), np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    if mode in ("I", "F", "LAB"):
        return image.convert("L").convert(mode) if mode != "LAB" else Image.merge("LAB", image.split())
    return image.convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def poison(kind: str) -> bytes:
    info = PngInfo()
    info.add_text("comment", f"poison:{kind}")
    return encode(noise(77), pnginfo=info)


def good_images(rng_start: int, number: int) -> list[bytes]:
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]
    return [encode(noise(rng_start + i), kinds[i % len(kinds)]) for i in range(number)]


def odd_images() -> dict[str, bytes]:
    """Strange but good: every mode that a file can hold, tiny sides, many frames, broken EXIF."""
    png = ["1", "L", "LA", "I;16", "P", "RGB", "RGBA"]
    tiff = ["1", "L", "I", "I;16", "F", "P", "CMYK", "YCbCr", "LAB", "RGBX"]
    found = {f"mode-{m.replace(';', '')}.png": encode(noise(i, mode=m), "PNG") for i, m in enumerate(png)}
    found |= {f"mode-{m.replace(';', '')}.tif": encode(noise(i, mode=m), "TIFF") for i, m in enumerate(tiff)}
    found |= {f"mode-{m}.jpg": encode(noise(i, mode=m), "JPEG") for i, m in enumerate(["L", "CMYK", "YCbCr"])}
    sides = [(1, 1), (1, 8), (8, 1), (2, 3), (5, 8), (7, 4), (8, 8), (3, 300)]
    found |= {f"side-{w}x{h}.png": encode(noise(w * 9 + h, w, h)) for w, h in sides}
    frames = [noise(i, 30, 20) for i in range(60)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        found[f"animated.{kind.lower()}"] = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    found["exif-garbage.jpg"] = encode(noise(1), "JPEG", exif=b"Exif\0\0" + b"\xff" * 60)
    found["exif-cut.jpg"] = encode(noise(2), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    return found


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Name → (content, code)."""
    jpeg, formats = encode(noise(5, 80, 80), "JPEG"), ["PNG", "WEBP", "GIF", "TIFF", "BMP"]
    found = {f"cut-{i:02d}.jpg": (jpeg[: len(jpeg) * i // 12], "truncated") for i in range(1, 12)}
    found |= {f"cut.{k.lower()}": (encode(noise(6), k)[:-40], "truncated") for k in formats}
    found["cut-in-magic.png"] = (b"\x89PN", "truncated")
    found |= {f"empty-{i}.jpg": (b"", "empty") for i in range(3)}
    texts = [b"<html>404</html>", b"PK\x03\x04" + bytes(99), b"BMW is a car, not a bitmap", bytes(1000), b"x"]
    found |= {f"text-{i}.jpg": (text, "not_an_image") for i, text in enumerate(texts)}
    foreign = [
        b"%PDF-1.7\n",
        b"<svg xmlns='x'/>",
        b"8BPS\0\1",
        b"\0\0\1\0\1\0",
        b"\0\0\0\x1cftypavif",
        b"P6 1 1 255\n\0",
    ]
    found |= {f"foreign-{i}.jpg": (data.ljust(64, b"\0"), "unsupported_format") for i, data in enumerate(foreign)}
    found["pixels.png"] = (encode(Image.new("1", (8000, 8000))), "too_many_pixels")
    found["pixels.tif"] = (encode(Image.new("1", (9000, 8000)), "TIFF", compression="group4"), "too_many_pixels")
    found["bytes.bmp"] = (encode(noise(7, 250, 250), "BMP"), "too_many_bytes")
    broken = bytearray(encode(noise(8, 60, 60)))
    broken[len(broken) // 2 : len(broken) // 2 + 40] = b"\x55" * 40
    found["damaged.png"] = (bytes(broken), "decode_failed")
    found |= {f"dark-{i}.png": (encode(Image.new("RGB", (20 + i, 20))), "prompt_too_long") for i in range(3)}
    found["segfault.png"] = (poison("segfault"), "quarantined")
    return found


@dataclass
class Expected:
    """What one row shall be: `code` None for ok; `data` where the image was read at all."""

    uri: str
    member: str | None
    data: bytes | None
    code: str | None


@dataclass
class Inputs:
    """Builds a prefix of a bucket and remembers what each input in it shall become."""

    root: Location
    expected: list[Expected] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def uri(self, name: str) -> str:
        return f"{self.root.uri}/{name}"

    def add(self, name: str, data: bytes, code: str | None = None, readable: bool = True) -> None:
        self.objects[name] = data
        self.expected.append(Expected(self.uri(name), None, data if readable else None, code))

    def add_tar(self, name: str, members: list[tuple[str, bytes, str | None]]) -> None:
        sidecars = [(f"{key.rpartition('.')[0]}.json", b"{}") for key, _, _ in members[:20]]
        self.objects[name], _ = tar_bytes([(key, data) for key, data, _ in members] + sidecars)
        self.expected += [Expected(self.uri(name), key, data, code) for key, data, code in members]

    def add_parquet(self, name: str, cells: list[tuple[bytes | None, str | None]], struct: bool) -> None:
        target = io.BytesIO()
        if struct:
            kind = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
            column = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, (data, _) in enumerate(cells)], kind)
        else:
            column = pa.array([data for data, _ in cells], pa.binary())
        pq.write_table(pa.table({"label": list(range(len(cells))), "image": column}), target, row_group_size=17)
        self.objects[name] = target.getvalue()
        self.expected += [Expected(self.uri(name), str(i), data, code) for i, (data, code) in enumerate(cells)]

    def upload(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda item: self.root.child(item[0]).put(item[1]), self.objects.items()))


def tar_bytes(members: list[tuple[str, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a tar and, of each member, where its content begins and where the next header would."""
    target = io.BytesIO()
    spans = []
    with tarfile.open(fileobj=target, mode="w") as archive:
        for key, data in members:
            info = tarfile.TarInfo(key)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            padded = -(-len(data) // 512) * 512
            spans.append((archive.offset - padded, archive.offset))
    return target.getvalue(), spans


def add_archives(inputs: Inputs) -> None:
    """Tars and Parquet files, most of them good, with bad members, cuts and repeats."""
    bad = {name: (data, code) for name, (data, code) in bad_images().items() if code != "quarantined"}
    good = [(f"{i:04d}.jpg", data, None) for i, data in enumerate(good_images(1000, 130))]
    inputs.add_tar("shards/good.tar", [*good, *[(f"bad/{n}", d, c) for n, (d, c) in list(bad.items())[::4]]])
    twice = [(f"{i}.png", data) for i, data in enumerate(good_images(2000, 6))]
    data, _ = tar_bytes([*twice, twice[2], ("5.png", b"other bytes")])
    inputs.objects["shards/twice.tar"] = data
    inputs.expected += [Expected(inputs.uri("shards/twice.tar"), key, image, None) for key, image in twice]
    inputs.expected += [Expected(inputs.uri("shards/twice.tar"), k, None, "duplicate_key") for k in ("2.png", "5.png")]
    for name, at_boundary in (("shards/cut-boundary.tar", True), ("shards/cut-inside.tar", False)):
        members = [(f"{i}.jpg", encode(noise(3000 + i, 80, 80), "JPEG")) for i in range(8)]
        data, spans = tar_bytes(members)
        inputs.objects[name] = data[: spans[4][1] if at_boundary else spans[5][0] + 700]
        inputs.expected += [Expected(inputs.uri(name), key, image, None) for key, image in members[:5]]
        if not at_boundary:
            inputs.expected.append(Expected(inputs.uri(name), "5.jpg", None, "truncated"))
        inputs.expected.append(Expected(inputs.uri(name), None, None, "archive_truncated"))
    cells: list[tuple[bytes | None, str | None]] = [(data, None) for data in good_images(4000, 90)]
    cells[10], cells[50] = (None, "empty"), (None, "empty")
    cells += [(data, code) for data, code in list(bad.values())[1::4]]
    inputs.add_parquet("tables/binary.parquet", cells, struct=False)
    inputs.add_parquet("tables/struct.parquet", [(d, None) for d in good_images(5000, 50)] + cells[50:51], struct=True)
    inputs.add("shards/packed.tar.gz", b"\x1f\x8b" + bytes(100), "unsupported_format", readable=False)
    inputs.add("shards/not-a.tar", b"hello" * 500, "archive_invalid", readable=False)
    inputs.add(
        "tables/broken.parquet", inputs.objects["tables/binary.parquet"][:-99], "parquet_invalid", readable=False
    )


@pytest.fixture(scope="module")
def image_config(tiny_checkpoint: Path) -> ImageConfig:
    return ImageConfig.from_pretrained(tiny_checkpoint)


def make_job(s3: str, checkpoint: Path, source: Source, tasks: tuple[Task, ...], **changes: Any) -> Job:
    return Job(
        name="end-to-end",
        source=source,
        output=Output(f"s3://test/out-{next(_names)}", s3),
        model=Model(str(checkpoint), dtype="float32"),
        tasks=tasks,
        image=ImageOptions(upscale=False, max_bytes=MAX_BYTES, timeout_s=60.0),
        engine=EngineOptions(threads=1),
        **changes,
    )


def read_output(job: Job, folder: Path) -> tuple[list[Path], pa.Table]:
    """Download `data/` and return the files and all their rows."""
    files = []
    for info in Location(job.output.uri, job.output.endpoint_url).child("data").list():
        path = folder / info.uri.rpartition("/")[2]
        path.write_bytes(Location(info.uri, job.output.endpoint_url).read())
        files.append(path)
    assert files
    return files, pa.concat_tables([pq.read_table(path) for path in files])


@dataclass(frozen=True)
class Done:
    """The large job after its run."""

    job: Job
    inputs: Inputs
    summary: Summary
    files: list[Path]
    table: pa.Table


@pytest.fixture(scope="module")
def done(s3: str, ray_cluster: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    inputs = Inputs(Location("s3://test/large", s3))
    for i, data in enumerate(good_images(0, 230)):
        inputs.add(f"photos/{i:04d}", data)
    for name, data in odd_images().items():
        inputs.add(f"odd/{name}", data)
    for name, (data, code) in bad_images().items():
        inputs.add(f"bad/{name}", data, code, readable=code not in ("too_many_bytes",))
    for i in range(3):
        inputs.add(f"forbidden/{i}.jpg", encode(noise(i)), "forbidden", readable=False)
    add_archives(inputs)
    inputs.upload()
    for i in range(4):
        inputs.expected.append(Expected(inputs.uri(f"gone/{i}.jpg"), None, None, "not_found"))
    inputs.expected.append(Expected(inputs.uri("gone/archive.tar"), None, None, "not_found"))
    uris = dict.fromkeys(expected.uri for expected in inputs.expected)
    inputs.root.child("lists/all.jsonl").put(
        "\n".join(json.dumps({"id": i, "uri": uri}) for i, uri in enumerate(uris)).encode()
    )
    deny = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:GetObject"],
        "Resource": ["arn:aws:s3:::test/large/forbidden/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    inputs.root.fs.call_s3("put_bucket_policy", Bucket="test", Policy=policy)
    source = Source(inputs.uri("lists/all.jsonl"), "list", endpoint_url=s3)
    job = make_job(s3, tiny_checkpoint, source, (CAPTION, PICKY, SAMPLED))
    try:
        summary = run(job, answerer_factory=PixelAnswerer)
    finally:
        inputs.root.fs.call_s3("delete_bucket_policy", Bucket="test")
    files, table = read_output(job, tmp_path_factory.mktemp("large"))
    return Done(job, inputs, summary, files, table)


def tiles_of(data: bytes, config: ImageConfig) -> Tiles:
    return split_image(decode_image(data).image, config, POLICY)


def test_every_input_has_exactly_one_row_with_the_expected_code(done: Done) -> None:
    expected = Counter((e.uri, e.member, e.code) for e in done.inputs.expected)
    errors = [error and error["code"] for error in done.table["error"].to_pylist()]
    found = Counter(zip(done.table["uri"].to_pylist(), done.table["member"].to_pylist(), errors, strict=True))
    assert found == expected
    assert [(s, e is None) for s, e in zip(done.table["status"].to_pylist(), errors, strict=True)] == [
        ("ok" if e is None else "error", e is None) for e in errors
    ]
    assert done.table.num_rows >= 500
    assert sum(code is not None for code in errors) >= 60
    assert set(filter(None, errors)) == ALL_CODES


def test_texts_are_those_of_tiles_made_in_process(done: Done, image_config: ImageConfig) -> None:
    by_key = {(e.uri, e.member): e for e in done.inputs.expected if e.code in (None, "prompt_too_long")}
    checked = 0
    for row in done.table.to_pylist():
        if row["status"] == "error" and row["error"]["code"] != "prompt_too_long":
            assert row["caption"] is row["ocr"] is row["mood"] is None
            continue
        data = by_key[row["uri"], row["member"]].data
        assert data is not None
        tiles = tiles_of(data, image_config)
        assert row["num_tiles"] == len(tiles.pixels)
        decoded = decode_image(data)
        assert (row["width"], row["height"], row["format"]) == (decoded.width, decoded.height, decoded.format)
        assert row["caption"]["text"] == text_of(tiles, CAPTION, 0)
        assert row["mood"]["text"].startswith(text_of(tiles, CAPTION, 0).replace(CAPTION.prompt, SAMPLED.prompt) + " ")
        refused = row["status"] == "error"
        assert (row["ocr"] is None) == refused
        if not refused:
            assert row["ocr"]["text"] == text_of(tiles, PICKY, 0)
            assert row["ocr"]["finish_reason"] == "stop"
        checked += 1
    assert checked == len(by_key) >= 400


def test_the_summary_counts_rows_errors_and_bytes(done: Done, image_config: ImageConfig) -> None:
    summary, expected = done.summary, done.inputs.expected
    assert summary.inputs == summary.rows == len(expected)
    assert summary.ok == sum(e.code is None for e in expected)
    assert summary.errors_by_code == Counter(e.code for e in expected if e.code)
    assert (summary.resumed_rows, summary.interrupted) == (0, False)
    fetched = [e.data for e in expected if e.data is not None and e.code != "too_many_bytes"]
    assert summary.compressed_bytes == sum(map(len, fetched))
    prepared = [e.data for e in expected if e.data is not None and e.code in (None, "prompt_too_long")]
    assert summary.tile_bytes == sum(tiles_of(data, image_config).pixels.nbytes for data in prepared)


def test_the_files_say_where_their_rows_came_from(done: Done) -> None:
    manifest = load_manifest(Location(done.job.output.uri, done.job.output.endpoint_url))
    assert manifest is not None
    claimed = []
    for path in done.files:
        metadata = pq.read_metadata(path).metadata
        table = pq.read_table(path)
        assert table.schema.remove_metadata() == output_schema(done.job.tasks)
        rows = footer_rows(metadata, manifest.rows_per_shard)
        assert count(rows) == table.num_rows
        claimed.append(rows)
        assert metadata[b"smolvlm.job"] == b"end-to-end"
        assert metadata[b"smolvlm.model"] == done.job.model.id.encode()
        assert len(metadata[b"smolvlm.fingerprint"]) == 64
        assert {b"smolvlm.revision", b"smolvlm.version"} <= set(metadata)
    assert union(*claimed).tolist() == [[0, manifest.rows]]
    assert sum(map(count, claimed)) == manifest.rows
    success = json.loads(Location(done.job.output.uri, done.job.output.endpoint_url).child("_SUCCESS.json").read())
    assert set(success["files"]) == {path.name for path in done.files}
    assert success["rows"] == success["inputs"] == manifest.rows


Reader = Callable[[list[Path]], list[dict[str, Any]]]


def by_duckdb(files: list[Path]) -> list[dict[str, Any]]:
    import duckdb

    with duckdb.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [[str(path) for path in files]])
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def by_pandas(files: list[Path]) -> list[dict[str, Any]]:
    import pandas

    frame = pandas.concat([pandas.read_parquet(path, dtype_backend="pyarrow") for path in files])
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [{key: None if value is pandas.NA else value for key, value in row.items()} for row in rows]


def by_polars(files: list[Path]) -> list[dict[str, Any]]:
    import polars

    return polars.read_parquet(files).to_dicts()


@pytest.mark.parametrize("reader", [by_duckdb, by_pandas, by_polars])
def test_other_readers_see_the_same_contents(done: Done, reader: Reader) -> None:
    def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(rows, key=lambda row: (row["shard_id"], row["row"]))

    assert ordered(reader(done.files)) == ordered(done.table.to_pylist())


def test_a_prefix_of_mixed_kinds_is_taken_object_by_object(
    s3: str, ray_cluster: str, tiny_checkpoint: Path, tmp_path: Path, image_config: ImageConfig
) -> None:
    inputs = Inputs(Location(f"s3://test/mixed-{next(_names)}", s3))
    for i, data in enumerate(good_images(0, 12)):
        inputs.add(f"a/{i}.jpg", data)
    inputs.add("b/empty.png", b"", "empty")
    inputs.add_tar("c.tar", [(f"{i}.png", data, None) for i, data in enumerate(good_images(50, 9))])
    inputs.add_parquet("d.parquet", [(data, None) for data in good_images(90, 8)], struct=True)
    inputs.objects |= {"README.md": b"no image", "_hidden/x.jpg": b"x", ".cache/y.jpg": b"y", "a/notes.txt": b"z"}
    inputs.upload()
    job = make_job(s3, tiny_checkpoint, Source(inputs.root.uri + "/", endpoint_url=s3), (CAPTION,))
    summary = run(job, answerer_factory=PixelAnswerer)
    assert (summary.inputs, summary.ok, summary.errors_by_code) == (30, 29, {"empty": 1})
    _, table = read_output(job, tmp_path)
    texts = {(row["uri"], row["member"]): row["caption"] and row["caption"]["text"] for row in table.to_pylist()}
    assert texts == {
        (e.uri, e.member): None if e.code else text_of(tiles_of(e.data or b"", image_config), CAPTION, 0)
        for e in inputs.expected
    }
    again = run(job, answerer_factory=PixelAnswerer)  # nothing is left to do
    assert (again.resumed_rows, again.ok, again.tile_bytes) == (30, 29, 0)


def test_a_source_without_images_is_a_config_error(s3: str, ray_cluster: str, tiny_checkpoint: Path) -> None:
    job = make_job(s3, tiny_checkpoint, Source(f"s3://test/none-{next(_names)}/", endpoint_url=s3), (CAPTION,))
    with pytest.raises(ConfigError, match="no image, tar or Parquet file found"):
        run(job, answerer_factory=PixelAnswerer)


def test_the_real_engine_says_in_a_job_what_it_says_alone(
    s3: str, ray_cluster: str, tiny_checkpoint: Path, tmp_path: Path, image_config: ImageConfig
) -> None:
    from smolvlm import Engine, Processor, SamplingParams

    images = {f"{i}.png": encode(noise(i)) for i in range(10)}
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    tasks = (CAPTION, Task("ocr", "Read.", max_new_tokens=9))
    job = make_job(s3, tiny_checkpoint, Source(str(tmp_path)), tasks)
    summary = run(job)
    assert (summary.ok, summary.error) == (10, 0)
    (tmp_path / "out").mkdir()
    _, table = read_output(job, tmp_path / "out")
    processor = Processor.from_pretrained(tiny_checkpoint)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    tokens = 0
    for row in table.to_pylist():
        tiles = tiles_of(images[Path(row["uri"]).name], image_config)
        for task in tasks:
            content = [{"type": "image"}, {"type": "text", "text": task.prompt}]
            model_input = processor.from_tiles([{"role": "user", "content": content}], [tiles])
            (alone,) = engine.generate([model_input], SamplingParams(max_new_tokens=task.max_new_tokens))
            found = row[task.name]
            assert found["text"] == processor.decode(alone.token_ids).strip().strip()
            assert found["finish_reason"] == alone.finish_reason
            assert (found["prompt_tokens"], found["output_tokens"]) == (alone.prompt_tokens, len(alone.token_ids))
            assert found["mean_logprob"] == pytest.approx(alone.mean_logprob, abs=1e-3)
            tokens += len(alone.token_ids)
    assert summary.output_tokens == tokens
    assert len({row["caption"]["text"] for row in table.to_pylist()}) > 1
