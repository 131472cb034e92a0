"""A job with fast images: rows say what the files are, and the engine gets tiles of the fast policy."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from standin import PixelAnswerer, text_of

from pipeline.job import ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, decode_image, split_decoded

SIDEWAYS = 6
TASK = Task("caption", "Describe.")


def photograph() -> bytes:
    """A JPEG of 301×203 pixels that a camera held sideways."""
    rng, target, exif = np.random.default_rng(0), io.BytesIO(), Image.Exif()
    exif[0x0112] = SIDEWAYS
    Image.fromarray(rng.integers(0, 256, (203, 301, 3), np.uint8)).save(target, "JPEG", exif=exif)
    return target.getvalue()


def test_rows_keep_the_size_of_the_file(tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.jpg").write_bytes(photograph())
    source, config = Source(str(tmp_path / "in")), ImageConfig.from_pretrained(tiny_checkpoint)
    exact = Job("fast", source, Output(str(tmp_path / "exact")), Model(str(tiny_checkpoint)), (TASK,))
    fast = replace(exact, output=Output(str(tmp_path / "fast")), image=ImageOptions(fast=True))
    found = {}
    for job in (exact, fast):
        run(job, answerer_factory=PixelAnswerer)
        (row,) = pq.read_table(f"{job.output.uri}/data").to_pylist()
        policy = ImagePolicy(fast=job.image.fast)
        decoded = decode_image(photograph(), needed=policy.needed(config))
        tiles = split_decoded(decoded, config, policy)
        assert (decoded.image.width < 203) == job.image.fast
        assert (row["width"], row["height"], row["format"]) == (203, 301, "JPEG")
        assert row["num_tiles"] == len(tiles.pixels) == 13
        assert row["caption"]["text"] == text_of(tiles, TASK, 0)
        found[job.output.uri] = row["caption"]["text"]
    assert len(set(found.values())) == 2
