"""Images with their texts, read by index in a fixed order: what training and evaluation see.

Built on the pipeline's own sources: Parquet with an image and a text column, lists of URIs with a text column, and
WebDataset tars of `key.jpg` and `key.txt`. Texts are read and checked when the source is opened, so that a bad one
stops a training before it starts; images are read when they are asked for.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archive import IMAGE_SUFFIXES, image_column, object_row, parquet_rows
from pipeline.errors import ConfigError, RowError, RowFailure
from pipeline.fetch import Fetcher
from pipeline.job import ImageOptions, Source
from pipeline.records import MANIFEST_SCHEMA, ImageRef
from pipeline.source import input_batches, kind_of, list_files, names_inputs
from pipeline.storage import Location, ObjectInfo
from pipeline.tar import NotATar, TarCut, TarMember, tar_members
from pipeline.uri_list import read_labelled_list

Labels = Mapping[str, Any]
Entry = tuple[tuple[Any, ...], Labels]
"""A manifest row without its numbers, and what the label columns hold for it."""

_TEXT_SUFFIX = "txt"
_REF_FIELDS = [field for field in MANIFEST_SCHEMA if field.name not in ("shard_id", "row")]
_LABEL_FIELDS = [pa.field("label", pa.string()), pa.field("group", pa.string()), pa.field("degraded", pa.bool_())]
_SCHEMA = pa.schema([*_REF_FIELDS, *_LABEL_FIELDS])
_ROWS_PER_CHUNK = 10_000


@dataclass(frozen=True)
class LabelledImage:
    """One image file and what stands in it. `degraded` is None where the source does not say."""

    name: str
    data: bytes
    text: str
    kind: str = ""
    degraded: bool | None = None


@dataclass(frozen=True)
class LabelColumns:
    """Where the labels stand. A tar has no columns: its text is the member `key.txt`."""

    text: str = "text"
    kind: str | None = None
    """Column with the kind of document; figures are reported for each."""
    degraded: str | None = None
    """Boolean column: whether the image is a bad one."""

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return list(dict.fromkeys(name for name in (self.text, self.kind, self.degraded) if name is not None))


class LabelledSource:
    """A sequence of labelled images; index i is the same image in every process, as long as the source stays the same.

    It may be pickled, with its texts, for processes that read images. Random access reads a whole row group of a
    Parquet file for one image: keep those at about a hundred rows.
    """

    def __init__(self, source: Source, columns: LabelColumns = LabelColumns()) -> None:
        """List the source and read its texts.

        Raises ConfigError: the source or a column does not exist, a file cannot be opened, a text is missing or empty.
        """
        self._source = source
        self._table = _read_table(source, columns)
        if not len(self):
            raise ConfigError(f"source {source.uri} holds no labelled images: it wants Parquet, a list, or tars")

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_table": self._table}  # connections and threads stay in their process

    @cached_property
    def _fetcher(self) -> Fetcher:
        return Fetcher(self._source, ImageOptions().max_bytes)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> LabelledImage:
        """Read one image. Raises RowFailure, which names the row, if its bytes cannot be had."""
        (found,) = self.read([index])
        if isinstance(found, RowError):
            raise RowFailure(found)
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of file names and labels in their order, wherever the files lie. Image bytes are not in it."""
        content = hashlib.sha256()
        for batch in self._table.to_batches(_ROWS_PER_CHUNK):
            for row in batch.to_pylist():
                parts = PurePosixPath(row["uri"]).name, row["member"], row["label"], row["group"], row["degraded"]
                content.update(repr(parts).encode())
        return content.hexdigest()

    def text(self, index: int) -> str:
        """Return the text of one image without reading the image."""
        return str(self._table["label"][index].as_py())

    def read(self, indices: Sequence[int]) -> list[LabelledImage | RowError]:
        """Read several images at once, in the order asked for; what cannot be read is a RowError that names its row."""
        wanted = [range(len(self))[index] for index in indices]
        order = sorted(set(wanted))  # neighbours in one archive are read together, and only in the archive's order
        rows = [self._table.slice(index, 1).to_pylist()[0] for index in order]
        refs = [_ref(index, row) for index, row in zip(order, rows, strict=True)]
        fetched = zip(order, rows, refs, self._fetcher.fetch(refs), strict=True)
        found = {index: _labelled(index, row, ref, data) for index, row, ref, data in fetched}
        return [found[index] for index in wanted]


def _ref(index: int, row: Mapping[str, Any]) -> ImageRef:
    return ImageRef(shard_id=0, row=index, **{field.name: row[field.name] for field in _REF_FIELDS})


def _labelled(index: int, row: Mapping[str, Any], ref: ImageRef, data: bytes | RowError) -> LabelledImage | RowError:
    name = _name(ref.uri, ref.member)
    if isinstance(data, RowError):
        return replace(data, message=f"row {index} ({name}): {data.message}")
    return LabelledImage(name, data, row["label"], row["group"], row["degraded"])


def _name(uri: str, member: str | None) -> str:
    return uri if member is None else f"{uri}#{member}"


def _read_table(source: Source, columns: LabelColumns) -> pa.Table:
    entries = enumerate(_entries(source, columns))
    rows = ((*ref, *_checked(index, ref, labels, columns)) for index, (ref, labels) in entries)
    chunks = []
    while chunk := list(islice(rows, _ROWS_PER_CHUNK)):
        values = zip(zip(*chunk, strict=True), _SCHEMA, strict=True)
        chunks.append(pa.table([pa.array(list(column), field.type) for column, field in values], schema=_SCHEMA))
    return pa.concat_tables(chunks).combine_chunks() if chunks else _SCHEMA.empty_table()


def _checked(index: int, ref: tuple[Any, ...], labels: Labels, columns: LabelColumns) -> tuple[str, str, bool | None]:
    """Return text, kind and whether the image is degraded. Raises ConfigError naming the row."""
    row = f"row {index} ({_name(*ref[:2])})"
    text = labels[columns.text]
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ConfigError(f"{row}: its text ({columns.text!r}) is empty; give it one, or leave the row out")
    if not isinstance(text, str):
        raise ConfigError(f"{row}: {columns.text!r} is {text!r}, no text; name the text column, or store text in it")
    kind = labels[columns.kind] if columns.kind else None
    return text, "" if kind is None else str(kind), _truth(row, labels, columns.degraded)


def _truth(row: str, labels: Labels, column: str | None) -> bool | None:
    if column is None:
        return None
    value = labels[column]
    value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value  # CSV has no types
    if not isinstance(value, bool):
        raise ConfigError(f"{row}: {column!r} is {labels[column]!r}; it must be true or false")
    return value


def _entries(source: Source, columns: LabelColumns) -> Iterator[Entry]:
    location = Location(source.uri, source.endpoint_url)
    if names_inputs(source):
        for file in list_files(source, location):
            for info, labels in read_labelled_list(file, source.column, columns.names):
                yield _list_entry(info, labels, file, source)
        return
    for batch in sorted(input_batches(source, location), key=lambda batch: batch.objects[0].uri):
        if batch.kind == "parquet":
            yield from _parquet_entries(batch.objects[0], source, columns)
        elif batch.kind == "tar":
            yield from _tar_entries(batch.objects[0], source, columns)
        else:
            first = batch.objects[0].uri
            remedy = "name them in a list with a text column, or choose Parquet or tars with a glob"
            raise ConfigError(f"source {source.uri}: {first} is an image without a text; {remedy}")


def _list_entry(info: ObjectInfo, labels: Labels, file: Location, source: Source) -> Entry:
    if kind_of(info.uri, source) != "object":
        raise ConfigError(f"list {file.uri}: {info.uri} is an archive; a labelled list names one image a row")
    return object_row(info), labels


def _parquet_entries(info: ObjectInfo, source: Source, columns: LabelColumns) -> Iterator[Entry]:
    labels = _parquet_labels(info, source, columns)
    for number, row in enumerate(parquet_rows(info, source)):
        yield row, {name: values[number] for name, values in labels.items()}


def _parquet_labels(info: ObjectInfo, source: Source, columns: LabelColumns) -> dict[str, list[Any]]:
    try:
        with Location(info.uri, source.endpoint_url).open() as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            for name in columns.names:
                if name not in names:
                    raise ConfigError(f"{info.uri}: no column {name!r} among {names}. Name the one that holds it.")
            image_column(parquet.schema_arrow, source.column)
            return {name: column.to_pylist() for name, column in _columns(parquet, columns.names)}
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{info.uri}: {type(error).__name__}: {error}; mend the file or leave it out") from error


def _columns(parquet: pq.ParquetFile, names: list[str]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    table = parquet.read(columns=names)
    return ((name, table[name]) for name in names)


def _tar_entries(info: ObjectInfo, source: Source, columns: LabelColumns) -> Iterator[Entry]:
    if columns.kind or columns.degraded:
        raise ConfigError(f"{info.uri}: a tar has a text (key.{_TEXT_SUFFIX}) and no other columns; name none of them")
    images, texts = _tar_members(info, source)
    for key in sorted(images.keys() ^ texts.keys()):
        lacks = f"an image without {key}.{_TEXT_SUFFIX}" if key in images else "a text without an image"
        raise ConfigError(f"{info.uri}: {(images.get(key) or texts[key]).name} is {lacks}; add it or leave it out")
    fetched = Fetcher(source, ImageOptions().max_bytes).fetch([_member_ref(info, texts[key]) for key in images])
    for key, data in zip(images, fetched, strict=True):
        image = images[key]
        row = (info.uri, image.name, "tar", image.size, info.etag, image.offset, None, None)
        yield row, {columns.text: _utf8(info, texts[key].name, data)}


def _tar_members(info: ObjectInfo, source: Source) -> tuple[dict[str, TarMember], dict[str, TarMember]]:
    """Return the images and the texts of a tar by key, the path up to the first dot of the file name."""
    images: dict[str, TarMember] = {}
    texts: dict[str, TarMember] = {}
    for member in _whole_members(info, source):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        found = texts if suffix == _TEXT_SUFFIX else images if suffix.lower() in IMAGE_SUFFIXES else None
        if found is None or not stem:  # metadata of other tools, hidden files
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key in found:
            raise ConfigError(f"{info.uri}: {found[key].name} and {member.name} have one key; keep one of them")
        found[key] = member
    return images, texts


def _whole_members(info: ObjectInfo, source: Source) -> Iterator[TarMember]:
    try:
        with Location(info.uri, source.endpoint_url).open() as file:
            size = file.seek(0, 2)
            file.seek(0)
            yield from tar_members(file, size)
    except (OSError, NotATar, TarCut) as error:
        raise ConfigError(f"{info.uri}: {error}; mend the tar (plain, not compressed) or leave it out") from error


def _member_ref(info: ObjectInfo, member: TarMember) -> ImageRef:
    return ImageRef(0, 0, info.uri, member.name, "tar", member.size, info.etag, member.offset)


def _utf8(info: ObjectInfo, name: str, data: bytes | RowError) -> str:
    """The text of a member; the line end that editors put behind the last line is the file's, not the text's."""
    if isinstance(data, RowError):
        raise ConfigError(f"{info.uri}: {data.message}")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{info.uri}: {name} is no UTF-8 text ({error.reason} at byte {error.start})") from error
