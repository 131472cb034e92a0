"""The CPU stage: manifest rows in, tiles out. One call takes one block and gives one block of the same rows.

The compressed bytes live and die inside the call; what leaves is uint8 tiles.
"""

import numpy as np
import pyarrow as pa

from pipeline.control import Control
from pipeline.decode_process import DecoderOptions
from pipeline.decoder import Decoder
from pipeline.decoder_child import Prepared
from pipeline.fetch import Fetcher
from pipeline.job import ImageOptions, Job
from pipeline.records import PREPARED_SCHEMA, ImageRef, error_value, image_refs
from smolvlm.config import ImageConfig
from smolvlm.image import ImageLimits, ImagePolicy

_DECODER_MEMORY_BYTES = 4 << 30


def decoder_options(
    image: ImageOptions, config: ImageConfig, memory_bytes: int = _DECODER_MEMORY_BYTES
) -> DecoderOptions:
    """Return what the decoder process must know of the images' treatment and the checkpoint."""
    return DecoderOptions(
        config=config,
        policy=ImagePolicy(
            longest_edge=image.longest_edge, upscale=image.upscale, image_splitting=image.splitting, fast=image.fast
        ),
        limits=ImageLimits(max_pixels=image.max_pixels, max_bytes=image.max_bytes),
        timeout_s=image.timeout_s,
        memory_bytes=memory_bytes,
    )


class PrepareWorker:
    """An actor of the prepare pool. While one call decodes, another may already fetch."""

    def __init__(self, job: Job, config: ImageConfig, control: Control, max_workers: int) -> None:
        control.enlist("prepare", max_workers)
        self._fetcher = Fetcher(job.source, job.image.max_bytes)
        self._decoder = Decoder(decoder_options(job.image, config))
        self._control = control

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the block's rows with `PREPARED_SCHEMA`; none of them while the run is draining."""
        if block.num_rows == 0 or self._control.is_draining():
            return PREPARED_SCHEMA.empty_table()
        refs = image_refs(block)
        fetched = self._fetcher.fetch(refs)
        images = [item for item in fetched if isinstance(item, bytes)]
        prepared, tiles = self._decoder.prepare(images)
        self._control.add("prepare", compressed_bytes=sum(map(len, images)), tile_bytes=len(tiles))
        answers = iter(prepared)
        rows = [next(answers) if isinstance(item, bytes) else Prepared(error=item) for item in fetched]
        return prepared_table(refs, rows, tiles)


def prepared_table(refs: list[ImageRef], rows: list[Prepared], tiles: bytes) -> pa.Table:
    """Return one block of `PREPARED_SCHEMA`; the tile bytes are not copied again."""
    columns = {name: [getattr(ref, name) for ref in refs] for name in ("uri", "member", "shard_id", "row", "etag")}
    columns |= {
        name: [getattr(row, name) for row in rows] for name in ("sha256", "width", "height", "format", "num_tiles")
    }
    columns |= {"grid_rows": [row.rows for row in rows], "grid_cols": [row.cols for row in rows]}
    columns["error"] = [error_value(row.error) for row in rows]
    arrays = [pa.array(columns[field.name], field.type) for field in PREPARED_SCHEMA if field.name != "tiles"]
    return pa.Table.from_arrays([*arrays, _tile_column(rows, tiles)], schema=PREPARED_SCHEMA)


def _tile_column(rows: list[Prepared], tiles: bytes) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([row.num_bytes for row in rows], out=offsets[1:])
    assert offsets[-1] == len(tiles), "the decoder's answers and its tiles disagree"
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(tiles)]
    )
