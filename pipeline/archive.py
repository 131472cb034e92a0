"""Objects that hold many images: manifest rows of a WebDataset tar or a Parquet file, from headers and footers."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.job import Source
from pipeline.records import Kind
from pipeline.storage import Location, ObjectInfo, with_retries
from pipeline.tar import NotATar, TarCut, TarMember, tar_members

# Suffixes that claim to be images, readable or not: an unreadable one is a row with an error, not a silent gap.
IMAGE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif mpo png webp gif tif tiff bmp dib heic heif avif jxl jp2 j2k ico svg psd".split()  # noqa: SIM905
)
IMAGE_COLUMNS = ("image", "jpg", "png", "bytes", "image_bytes", "content")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def object_row(
    info: ObjectInfo, kind: Kind = "object", code: str | None = None, message: str | None = None
) -> tuple[Any, ...]:
    """Return the manifest row, without its numbers, of an object taken as a whole."""
    return (info.uri, None, kind, info.size, info.etag, None, code, message)


def tar_rows(info: ObjectInfo, source: Source) -> Iterator[tuple[Any, ...]]:
    """One row per image member, then one for the archive itself if it is cut."""
    if info.uri.lower().endswith(COMPRESSED_TARS):
        yield object_row(
            info, "tar", "unsupported_format", f"{info.uri}: compressed tars cannot be read in ranges; store plain .tar"
        )
        return
    location = Location(info.uri, source.endpoint_url)
    known = info if info.size is not None else with_retries(location.info)
    if known is None or known.size is None:
        raise FileNotFoundError(info.uri)
    seen: set[str] = set()
    try:
        with location.open() as file:
            for member in tar_members(file, known.size):
                if _is_image_name(member.name):
                    yield _member_row(known, member, member.name in seen)
                    seen.add(member.name)
    except TarCut as error:
        yield object_row(known, "tar", "archive_truncated", f"{info.uri}: {error}")
    except NotATar as error:
        yield object_row(known, "tar", "archive_invalid", f"{info.uri}: {error}")


def _is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith(".")


def _member_row(info: ObjectInfo, member: TarMember, duplicate: bool) -> tuple[Any, ...]:
    code = message = None
    if duplicate:
        code, message = "duplicate_key", f"{member.name} stands in {info.uri} more than once; the first one is read"
    elif not member.whole:
        code, message = "truncated", f"{info.uri} ends inside {member.name}"
    return (info.uri, member.name, "tar", member.size, info.etag, member.offset, code, message)


def parquet_rows(info: ObjectInfo, source: Source) -> Iterator[tuple[Any, ...]]:
    """One row per row of the file, or one for a file without an image column."""
    with Location(info.uri, source.endpoint_url).open() as file:
        try:
            parquet = pq.ParquetFile(file)
            image_column(parquet.schema_arrow, source.column)
        except (pa.ArrowException, ConfigError) as error:
            yield object_row(info, "parquet", "parquet_invalid", f"{info.uri}: {error}")
            return
        for index in range(parquet.metadata.num_rows):
            yield (info.uri, str(index), "parquet", None, info.etag, index, None, None)


def image_column(schema: pa.Schema, column: str | None) -> str:
    """Return the column that holds image bytes: binary, or a struct with a binary `bytes` field.

    Raises ConfigError naming the columns when there is none or when several could be meant.
    """
    candidates = [field.name for field in schema if _holds_bytes(field.type)]
    if column is not None:
        candidates = [name for name in candidates if name == column]
    elif len(candidates) > 1:
        candidates = [name for name in candidates if name in IMAGE_COLUMNS] or candidates
    if len(candidates) != 1:
        wanted = f"image column {column!r}" if column else "single image column"
        raise ConfigError(
            f"no {wanted} (binary, or struct with `bytes`) among {schema.names}. Name it with source.column."
        )
    return str(candidates[0])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
