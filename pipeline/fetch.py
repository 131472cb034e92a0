"""Manifest rows → image bytes. Neighbours in one archive share a request; what cannot be read is a `RowError`.

Runs inside the prepare workers, so compressed bytes never pass through the object store.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archive import image_column
from pipeline.errors import RowError, RowFailure
from pipeline.job import Source
from pipeline.records import ImageRef
from pipeline.storage import Location, read_failure, with_retries

Fetched = bytes | RowError
_REQUESTS_AT_ONCE = 16
_GAP_BYTES = 1 << 16  # reading this much too much is cheaper than another request
_GROUPS_KEPT = 2


class Fetcher:
    """Reads the bytes of manifest rows. Safe to call from several threads."""

    def __init__(self, source: Source, max_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="fetch")
        self._groups = _RowGroups(source)

    def fetch(self, refs: list[ImageRef]) -> list[Fetched]:
        """Return bytes or a row error for each of `refs`, in their order."""
        calls = [
            call for _, run in groupby(refs, key=lambda ref: (ref.kind, ref.uri)) for call in self._calls(list(run))
        ]
        if len(calls) <= 1 or not self._at(refs[0].uri).is_remote:
            parts = [call() for call in calls]
        else:
            parts = list(self._pool.map(lambda call: call(), calls))
        return [item for part in parts for item in part]

    def _at(self, uri: str) -> Location:
        return Location(uri, self._source.endpoint_url)

    def _calls(self, run: list[ImageRef]) -> Iterator[Callable[[], list[Fetched]]]:
        """Cut a run of rows from one object into reads that can go out at the same time."""
        if run[0].kind == "parquet":
            yield lambda: [self._guarded(ref, self._read_parquet) for ref in run]
        elif run[0].kind == "tar":
            for span in _spans(run, self._is_wanted):
                yield lambda span=span: self._read_span(span)  # type: ignore[misc]
        else:
            for ref in run:
                yield lambda ref=ref: [self._guarded(ref, self._read_object)]  # type: ignore[misc]

    def _is_wanted(self, ref: ImageRef) -> bool:
        return ref.listed_error is None and (ref.size or 0) <= self._max_bytes

    def _guarded(self, ref: ImageRef, read: Callable[[ImageRef], bytes]) -> Fetched:
        """Refuse what the manifest already knows to be bad, then read."""
        if ref.listed_error is not None:
            return ref.listed_error
        if (ref.size or 0) > self._max_bytes:
            return self._too_large(ref, ref.size or 0)
        try:
            data = read(ref)
        except RowFailure as failure:
            return failure.error
        except Exception as error:  # one unreadable object is one row, whatever the store's library raised
            return read_failure(error, ref.uri).error
        return data if len(data) <= self._max_bytes else self._too_large(ref, len(data))

    def _too_large(self, ref: ImageRef, size: int) -> RowError:
        message = f"{ref.member or ref.uri} has {size} bytes or more; image.max_bytes is {self._max_bytes}"
        return RowError("too_many_bytes", "read", message)

    def _read_object(self, ref: ImageRef) -> bytes:
        if ref.size is None:  # from a list: the size is not known, so ask for one byte more than allowed
            return self._at(ref.uri).read(0, self._max_bytes + 1)
        data = self._at(ref.uri).read()
        if len(data) != ref.size:
            raise RowFailure(
                RowError("changed", "read", f"{ref.uri}: {len(data)} bytes now, {ref.size} when it was listed")
            )
        return data

    def _read_span(self, span: list[ImageRef]) -> list[Fetched]:
        """Read neighbouring members with one request and cut them apart."""
        good = [ref for ref in span if self._is_wanted(ref)]
        if not good:
            return [self._guarded(ref, self._read_object) for ref in span]
        start = good[0].offset or 0
        stop = max((ref.offset or 0) + (ref.size or 0) for ref in good)
        try:
            whole = self._at(span[0].uri).read(start, stop) if stop > start else b""
        except Exception as error:
            failed = read_failure(error, span[0].uri).error
            return [ref.listed_error or failed for ref in span]
        view = memoryview(whole)
        return [self._guarded(ref, lambda ref: _cut(view, ref, start)) for ref in span]

    def _read_parquet(self, ref: ImageRef) -> bytes:
        value = self._groups.value(ref)
        if value is None:
            raise RowFailure(RowError("empty", "read", f"{ref.uri} row {ref.member}: the image is null"))
        return value


def _cut(view: memoryview, ref: ImageRef, start: int) -> bytes:
    begin = (ref.offset or 0) - start
    data = bytes(view[begin : begin + (ref.size or 0)])
    if len(data) != ref.size:
        raise RowFailure(RowError("truncated", "read", f"{ref.uri} ends inside {ref.member}"))
    return data


def _spans(run: list[ImageRef], is_wanted: Callable[[ImageRef], bool]) -> Iterator[list[ImageRef]]:
    """Cut a run of members where the archive has more between two wanted ones than a request is worth."""
    span: list[ImageRef] = []
    end = 0
    for ref in run:
        wanted = is_wanted(ref)
        if span and wanted and (ref.offset or 0) - end > _GAP_BYTES:
            yield span
            span = []
        span.append(ref)
        if wanted:
            end = (ref.offset or 0) + (ref.size or 0)
    if span:
        yield span


class _RowGroups:
    """The row groups read last. Rows come in order, so a group is read once by each worker that gets some of it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], pa.ChunkedArray | Exception] = OrderedDict()
        self._files: dict[str, tuple[pq.ParquetFile, str, list[int]]] = {}

    def value(self, ref: ImageRef) -> bytes | None:
        """Return the image bytes of one Parquet row, None if the cell is null."""
        with self._lock:
            file, column, starts = self._file(ref.uri)
            index = ref.offset or 0
            group = max(i for i, start in enumerate(starts) if start <= index)
            values = self._group(ref.uri, file, column, group)
            return _image_bytes(values[index - starts[group]].as_py())

    def _file(self, uri: str) -> tuple[pq.ParquetFile, str, list[int]]:
        if uri not in self._files:
            self._files.clear()  # one open file at a time: its rows are neighbours
            location = Location(uri, self._source.endpoint_url)
            file = with_retries(lambda: pq.ParquetFile(location.open()))
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self._files[uri] = (file, image_column(file.schema_arrow, self._source.column), starts)
        return self._files[uri]

    def _group(self, uri: str, file: pq.ParquetFile, column: str, group: int) -> pa.ChunkedArray:
        key = (uri, group)
        if key not in self._kept:
            try:
                self._kept[key] = with_retries(lambda: file.read_row_group(group, columns=[column]))[column]
            except Exception as error:  # kept too: retrying a damaged group for each of its rows would take hours
                self._kept[key] = error
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        kept = self._kept[key]
        if isinstance(kept, Exception):
            raise kept
        return kept


def _image_bytes(cell: object) -> bytes | None:
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    return value if isinstance(value, bytes) else None
