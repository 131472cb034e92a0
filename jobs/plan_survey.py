"""What a source holds: everything counted, and a stratified sample of its images. Nothing is written anywhere."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.job import Source
from pipeline.records import ImageRef
from pipeline.source import Expand, InputBatch, manifest_tables

_THREADS = 16
_FEWEST_OF_A_STRATUM = 2  # with one, nobody could tell how much its kind varies
# Neighbours in an archive share a request or a row group, as they do in a run.
_NEIGHBOURS = {"object": 1, "tar": 8, "parquet": 8}
_SUFFIX = r"\.(?P<suffix>[A-Za-z0-9]{1,5})$"


@dataclass(frozen=True)
class SampledRef:
    """One image of the sample; it stands for `weight` images of the source."""

    ref: ImageRef
    weight: float


@dataclass(frozen=True)
class Survey:
    """All inputs of a source, as its listing tells.

    `known_bytes` are those of the `sized` images whose size the listing tells; `listed_errors` are inputs that listing
    already found to be bad. The sample is in the order of the listing.
    """

    images: int
    sized: int
    known_bytes: int
    listed_errors: Counter[str]
    sample: tuple[SampledRef, ...]


def survey(source: Source, limit: int | None, sample: int, seed: int) -> Survey:
    """List the source (its first `limit` inputs) with the pipeline's own code, and draw about `sample` images.

    Images are drawn by kind, name suffix and size class, from each as many as its part of the source, two at least.
    Memory is that of the sample, whatever the source holds. Raises ConfigError where the source cannot be listed.
    """
    tally = _Tally(sample, np.random.default_rng(seed))
    for table in _first(manifest_tables(source, _expand_in_threads), limit):
        tally.add(table)
    return tally.survey()


@dataclass
class _Stratum:
    """A reservoir: the images with the smallest of random keys. Any number of the first of them is a fair sample."""

    images: int = 0
    keys: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, table: pa.Table, indices: npt.NDArray[np.int64], keys: npt.NDArray[np.float64], most: int) -> None:
        self.images += len(indices)
        worst = self.keys[-1] if len(self.keys) == most else np.inf
        better = np.flatnonzero(keys < worst)
        better = better[np.argsort(keys[better])][:most]
        rows = self.rows + table.take(pa.array(indices[better])).to_pylist()
        merged = np.concatenate([self.keys, keys[better]])
        order = np.argsort(merged)[:most]
        self.keys, self.rows = merged[order], [rows[index] for index in order]


class _Tally:
    def __init__(self, sample: int, rng: np.random.Generator) -> None:
        self._sample, self._rng = sample, rng
        self._images = self._sized = self._bytes = 0
        self._errors: Counter[str] = Counter()
        self._strata: dict[str, _Stratum] = {}

    def add(self, table: pa.Table) -> None:
        """Count a table of manifest rows and let its images into the sample."""
        numbers = pa.array(np.arange(self._images, self._images + table.num_rows))
        self._images += table.num_rows
        table = table.append_column("place", numbers)
        self._errors.update(code for code in table["error_code"].drop_null().to_pylist())
        table = table.filter(pc.is_null(table["error_code"]))
        if not table.num_rows:
            return
        self._sized += table.num_rows - table["size"].null_count
        self._bytes += pc.sum(table["size"]).as_py() or 0
        names = pc.dictionary_encode(_strata(table)).combine_chunks()
        codes, keys = names.indices.to_numpy(), self._keys(table)
        for code, name in enumerate(names.dictionary.to_pylist()):
            inside = np.flatnonzero(codes == code)
            self._strata.setdefault(name, _Stratum()).add(table, inside, keys[inside], self._sample)

    def survey(self) -> Survey:
        """Return the counts and the sample."""
        drawn = [item for stratum in self._strata.values() for item in self._drawn(stratum)]
        drawn.sort(key=lambda item: item.ref.row)
        return Survey(self._images, self._sized, self._bytes, self._errors, tuple(drawn))

    def _drawn(self, stratum: _Stratum) -> Iterator[SampledRef]:
        good = self._images - self._errors.total()
        share = round(self._sample * stratum.images / good)
        rows = stratum.rows[: max(share, _FEWEST_OF_A_STRATUM)]
        for row in rows:
            place = row.pop("place")
            yield SampledRef(ImageRef(shard_id=0, row=place, **row), stratum.images / len(rows))

    def _keys(self, table: pa.Table) -> npt.NDArray[np.float64]:
        """Random keys, one for several neighbours of an archive, so that they are drawn together."""
        run = _NEIGHBOURS[table["kind"][0].as_py()]  # a table comes of one batch, so of one kind
        keys = self._rng.random(-(-table.num_rows // run)).repeat(run)[: table.num_rows]
        ordered: npt.NDArray[np.float64] = keys + np.arange(len(keys)) * 1e-12
        return ordered


def _strata(table: pa.Table) -> pa.ChunkedArray:
    """Name each row's stratum: kind, suffix, and size in powers of four."""
    name = pc.coalesce(table["member"], table["uri"])
    suffix = pc.struct_field(pc.extract_regex(name, _SUFFIX), "suffix")
    size = pc.floor(pc.logb(pc.max_element_wise(table["size"].cast(pa.float64()), 1.0), 4.0))
    size = pc.if_else(pc.is_null(table["size"]), None, size)
    parts = [table["kind"], pc.fill_null(pc.utf8_lower(suffix), ""), pc.fill_null(size.cast(pa.string()), "")]
    return pc.binary_join_element_wise(*parts, "/")


def _first(tables: Iterable[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for table in tables:
        yield table if left is None else table.slice(0, left)
        if left is not None:
            left -= min(left, table.num_rows)
            if not left:
                return


def _expand_in_threads(expand: Expand, batches: Iterable[InputBatch]) -> Iterator[list[pa.Table]]:
    """Index archives, a bounded number at a time, in order: that is waiting for a store, mostly."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: list[Future[list[pa.Table]]] = []
        for batch in batches:
            waiting.append(pool.submit(expand, batch))
            if len(waiting) > 2 * _THREADS:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
