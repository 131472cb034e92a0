"""`smolvlm report`: a sample of an output's rows with their pictures, read again from the source, on one page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jobs.report_sample import Drawn, draw, group_order
from jobs.stored import stored_job
from pipeline import ranges
from pipeline.commit import Commit, read_columns, read_commits, row_numbers
from pipeline.decode_process import DecoderOptions
from pipeline.decoder import Decoder
from pipeline.decoder_child import Prepared
from pipeline.errors import ConfigError
from pipeline.fetch import Fetcher
from pipeline.job import Job
from pipeline.lease import Holder, holders
from pipeline.manifest import Manifest, load_manifest, read_rows
from pipeline.records import image_refs, output_schema
from pipeline.storage import Location
from smolvlm.config import ImageConfig
from smolvlm.image import ImageLimits, ImagePolicy

PICTURE_EDGE = 176
_IMAGES_AT_ONCE = 16
_DECODER_MEMORY_BYTES = 4 << 30
_SINGLE_TILE = ImageConfig(PICTURE_EDGE, PICTURE_EDGE, False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Sample:
    """One row of the output, its group, and its picture or why there is none."""

    group: str
    row: dict[str, Any]
    picture: Image.Image | None
    why_blank: str = ""


@dataclass(frozen=True)
class Gallery:
    """What the page shows. `groups` counts all rows of the output, whether shown or not."""

    location: Location
    job: Job
    inputs: int
    groups: Mapping[str, int]
    samples: Sequence[Sample]
    commits: Sequence[Commit]
    runs: Sequence[Holder]

    @property
    def rows(self) -> int:
        """Rows that the output holds."""
        return sum(self.groups.values())

    @property
    def errors(self) -> dict[str, int]:
        """Error rows by code, the most frequent first."""
        found = Counter(
            {name.removeprefix("error."): n for name, n in self.groups.items() if name.startswith("error.")}
        )
        return dict(found.most_common())

    @property
    def num_blank(self) -> int:
        """Samples without a picture."""
        return sum(sample.picture is None for sample in self.samples)


def write_report(uri: str, endpoint_url: str | None = None, samples: int = 200, seed: int = 0) -> str:
    """Gather and write; return where the page is."""
    return write(gather(uri, endpoint_url, samples, seed))


def gather(uri: str, endpoint_url: str | None, samples: int, seed: int) -> Gallery:
    """Draw rows and read their pictures. Raises ConfigError if there are no rows."""
    stored = stored_job(uri, endpoint_url)
    destination, job = stored.location, stored.job
    manifest = load_manifest(destination)
    commits = [] if manifest is None else read_commits(destination, manifest.rows_per_shard)
    if manifest is None or not commits:
        raise ConfigError(f"{uri}: no rows here yet, so nothing to show; run the job first")
    drawn = draw(destination, commits, manifest, [task.name for task in job.tasks], samples, seed)
    rows = _rows(destination, manifest, job, drawn)
    shown = list(_samples(destination, manifest, job, drawn, rows))
    return Gallery(destination, job, manifest.rows, drawn.groups, shown, commits, holders(destination))


def write(gallery: Gallery) -> str:
    """Store the page as `report.html` in the output and return where that is."""
    from jobs.report_page import page

    place = gallery.location.child("report.html")
    place.put(page(gallery).encode())
    return place.uri


def _rows(destination: Location, manifest: Manifest, job: Job, drawn: Drawn) -> dict[int, dict[str, Any]]:
    """Read the drawn rows whole, by number."""
    columns = output_schema(job.tasks).names
    found: dict[int, dict[str, Any]] = {}
    for table in read_columns(destination, drawn.commits, columns):
        numbers = row_numbers(table, manifest.rows_per_shard)
        wanted = np.flatnonzero(np.isin(numbers, drawn.numbers))
        found |= dict(zip(numbers[wanted].tolist(), table.take(wanted).to_pylist(), strict=True))
    return found


def _samples(
    destination: Location, manifest: Manifest, job: Job, drawn: Drawn, rows: Mapping[int, dict[str, Any]]
) -> Iterator[Sample]:
    """Pictures are read in the order of the manifest, where neighbours share requests; samples come group by group."""
    with_picture = [number for number in sorted(rows) if _had_picture(rows[number])]
    pictures = dict(zip(with_picture, _pictures(destination, manifest, job, with_picture), strict=True))
    for number, group in sorted(drawn.groups_by_number.items(), key=lambda item: (group_order(item[1]), item[0])):
        if number not in rows:
            continue  # its file was replaced by a run since
        picture, why = pictures.get(number, (None, ""))
        yield Sample(group, rows[number], picture, why)


def _had_picture(row: Mapping[str, Any]) -> bool:
    """What could not be read or decoded then is not tried again."""
    return row["error"] is None or row["error"]["stage"] == "generate"


def _pictures(
    destination: Location, manifest: Manifest, job: Job, numbers: Sequence[int]
) -> Iterator[tuple[Image.Image | None, str]]:
    """Yield each picture, or why it is not there any more. Strangers' bytes are decoded in a process of their own."""
    fetcher = Fetcher(job.source, job.image.max_bytes)
    decoder = Decoder(_decoder_options(job))
    try:
        tables = read_rows(destination, manifest, ranges.of_rows(np.array(numbers, np.int64)))
        refs = [ref for table in tables for ref in image_refs(table)]
        for start in range(0, len(refs), _IMAGES_AT_ONCE):
            fetched = fetcher.fetch(refs[start : start + _IMAGES_AT_ONCE])
            prepared, tiles = decoder.prepare([item for item in fetched if isinstance(item, bytes)])
            thumbnails = _thumbnails(prepared, tiles)
            for item in fetched:
                yield next(thumbnails) if isinstance(item, bytes) else (None, f"{item.code}: {item.message}")
    finally:
        decoder.close()


def _decoder_options(job: Job) -> DecoderOptions:
    limits = ImageLimits(max_pixels=job.image.max_pixels, max_bytes=job.image.max_bytes)
    policy = ImagePolicy(longest_edge=PICTURE_EDGE, image_splitting=False)
    return DecoderOptions(_SINGLE_TILE, policy, limits, job.image.timeout_s, _DECODER_MEMORY_BYTES)


def _thumbnails(prepared: Sequence[Prepared], tiles: bytes) -> Iterator[tuple[Image.Image | None, str]]:
    """The decoder's single tile is square; the picture gets its own shape back."""
    start = 0
    for each in prepared:
        if each.error is not None or each.width is None or each.height is None:
            yield None, "" if each.error is None else f"{each.error.code}: {each.error.message}"
            continue
        square = Image.frombytes("RGB", (PICTURE_EDGE, PICTURE_EDGE), tiles[start : start + each.num_bytes])
        start += each.num_bytes
        scale = PICTURE_EDGE / max(each.width, each.height)
        size = (max(1, round(each.width * scale)), max(1, round(each.height * scale)))
        yield square.resize(size, Image.Resampling.LANCZOS), ""
