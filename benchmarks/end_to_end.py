"""The pipeline against a plain loop and against Ray Data's own reader, on the same inputs, in one run.

    python benchmarks/end_to_end.py [--smoke] [--repeats N] [--images N] [--engine-images N] [--size 256m]

Case `standin`: tars of small JPEGs → tiles → a stand-in engine → Parquet, so that everything but the model is measured.
Ours, Ray's `read_webdataset` with the same preparation and stand-in, and a plain loop in this process take turns.
Case `engine`: photographs as files → a SmolVLM with random weights → Parquet, ours against a plain loop in one process
that prepares and generates with the same engine, so that the cost of being distributed is measured.

Start-up (actors, imports, weights) is taken out by timing a short and a long job and dividing the difference. The last
line of stdout is one JSON object.
"""

import argparse
import io
import json
import logging
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring.stand_ins import use_stand_ins
from PIL import Image
from rich.console import Console
from rich.table import Table

use_stand_ins()

import ray
from standin import PixelAnswerer

from pipeline.engine_worker import EngineWorker
from pipeline.generate import Answer, AnswererFactory
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.run import run
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, decode_image, split_image
from smolvlm.scratch import create_checkpoint

TASK = Task("caption", "Describe this image.", max_new_tokens=32)
IMAGES_PER_TAR = 1000
STANDIN_SEQUENCES = 512  # a GPU's batch: blocks are cut for the engine, and this one answers at once


@dataclass(frozen=True)
class Setting:
    """One case: its inputs, its checkpoint and how images are cut."""

    name: str
    source: Path
    checkpoint: Path
    image: ImageOptions
    engine: EngineOptions
    answerer: AnswererFactory
    short: int
    long: int


def ours(setting: Setting, images: int) -> float:
    """Return the seconds of one whole job over the first `images` inputs."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            name=setting.name,
            source=Source(str(setting.source)),
            output=Output(folder + "/out", rows_per_file=1024),
            model=Model(str(setting.checkpoint)),
            tasks=(TASK,),
            image=setting.image,
            engine=setting.engine,
            limit=images,
        )
        started = time.perf_counter()
        summary = run(job, answerer_factory=setting.answerer)
        assert summary.ok == images, summary
        return time.perf_counter() - started


def plain_loop(setting: Setting, images: int) -> float:
    """Return the seconds of the same work in one process: read, prepare and answer, then write one Parquet file."""
    config, policy = ImageConfig.from_pretrained(setting.checkpoint), image_policy(setting)
    answerer = setting.answerer(job_for_loop(setting))
    started = time.perf_counter()
    waiting = []
    for name, data in read_inputs(setting.source, images):
        tiles = split_image(decode_image(data).image, config, policy)
        waiting.append((name, answerer.submit(tiles, TASK, 0)))
    rows = [row(name, answer()) for name, answer in waiting]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    elapsed = time.perf_counter() - started
    answerer.close()
    assert len(rows) == images
    return elapsed


def ray_webdataset(setting: Setting, images: int) -> float:
    """Return the seconds of Ray Data's own reader and writer around the same preparation and stand-in."""
    config, policy, factory = ImageConfig.from_pretrained(setting.checkpoint), image_policy(setting), setting.answerer
    job = job_for_loop(setting)

    class Answering:
        def __init__(self) -> None:
            self.answerer = factory(job)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            tiles = [split_image(Image.fromarray(image), config, policy) for image in batch["jpg"]]
            answers = [self.answerer.submit(each, TASK, 0) for each in tiles]
            return {"key": batch["__key__"], "text": np.array([answer().text for answer in answers])}

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        paths = sorted(map(str, setting.source.glob("*.tar")))[: images // IMAGES_PER_TAR]
        dataset = ray.data.read_webdataset(paths, suffixes=["jpg"], num_cpus=0.5)
        dataset = dataset.map_batches(
            Answering, compute=ray.data.ActorPoolStrategy(size=1), batch_size=256, num_cpus=0.5
        )
        dataset.write_parquet(folder, ray_remote_args={"num_cpus": 0.5})
        elapsed = time.perf_counter() - started
        assert pq.read_table(folder).num_rows == images
        return elapsed


def image_policy(setting: Setting) -> ImagePolicy:
    """Return the case's policy as `split_image` wants it."""
    image = setting.image
    return ImagePolicy(longest_edge=image.longest_edge, upscale=image.upscale, image_splitting=image.splitting)


def job_for_loop(setting: Setting) -> Job:
    """Return a job that names the checkpoint, which is all that an answerer reads."""
    model = Model(str(setting.checkpoint))
    return Job(setting.name, Source("-"), Output("-"), model, (TASK,), setting.image, setting.engine)


def row(name: str, answer: Answer) -> dict[str, Any]:
    """Return what the loop writes of one image."""
    return {"uri": name, "text": answer.text, "finish_reason": answer.finish_reason}


def read_inputs(source: Path, images: int) -> list[tuple[str, bytes]]:
    """Return the first `images` names and bytes of a folder of tars or of files."""
    found: list[tuple[str, bytes]] = []
    for path in sorted(source.iterdir()):
        if path.suffix == ".tar":
            with tarfile.open(path) as archive:
                found += [(m.name, file.read()) for m in archive if (file := archive.extractfile(m)) is not None]
        else:
            found.append((path.name, path.read_bytes()))
        if len(found) >= images:
            break
    return found[:images]


def photograph(seed: int, width: int, height: int) -> bytes:
    """Return a JPEG with the statistics of a photograph: smooth shades and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.clip(np.asarray(coarse, dtype=np.int16) + rng.normal(0, 6, (height, width, 1)).astype(np.int16), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_tars(folder: Path, images: int) -> Path:
    """Write `images` small JPEGs into tars of IMAGES_PER_TAR and return the folder."""
    folder.mkdir()
    for first in range(0, images, IMAGES_PER_TAR):
        with tarfile.open(folder / f"{first:08d}.tar", "w") as archive:
            for index in range(first, min(first + IMAGES_PER_TAR, images)):
                data = photograph(index, 96, 72)
                info = tarfile.TarInfo(f"{index:08d}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def write_files(folder: Path, images: int) -> Path:
    """Write `images` photographs of 640×480 as files and return the folder."""
    folder.mkdir()
    for index in range(images):
        (folder / f"{index:06d}.jpg").write_bytes(photograph(index, 640, 480))
    return folder


def rate(measure: Callable[[Setting, int], float], setting: Setting) -> float:
    """Return images per second beyond the short job, or of the long one where the inputs are too few to tell."""
    short, long = measure(setting, setting.short), measure(setting, setting.long)
    return (setting.long - setting.short) / (long - short) if long > 1.1 * short else setting.long / long


def measure(
    setting: Setting, sides: dict[str, Callable[[Setting, int], float]], repeats: int
) -> dict[str, list[float]]:
    """Let all sides take turns, `repeats` times, and return each side's rates."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(rate(side, setting))
    return rates


def settings(
    root: Path, arguments: argparse.Namespace
) -> list[tuple[Setting, dict[str, Callable[[Setting, int], float]]]]:
    """Make the inputs and checkpoints of both cases."""
    tiny = create_checkpoint(root / "tiny", "tiny")
    small_tars = write_tars(root / "tars", arguments.images)
    one_tile = ImageOptions(splitting=False, upscale=False)
    large = EngineOptions(max_num_sequences=STANDIN_SEQUENCES)
    standin = Setting("standin", small_tars, tiny, one_tile, large, PixelAnswerer, IMAGES_PER_TAR, arguments.images)
    model = create_checkpoint(root / "model", arguments.size)
    photos = write_files(root / "photos", arguments.engine_images)
    short = max(1, arguments.engine_images // 3)
    default = EngineOptions()
    engine = Setting("engine", photos, model, one_tile, default, EngineWorker.for_job, short, arguments.engine_images)
    return [
        (standin, {"ours": ours, "ray read_webdataset": ray_webdataset, "plain loop": plain_loop}),
        (engine, {"ours": ours, "plain loop": plain_loop}),
    ]


def report(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print one case and return its medians and ratios."""
    medians = {side: statistics.median(values) for side, values in rates.items()}
    table = Table("side", "images/s (median)", "min", "max", "ours / side", title=name)
    for side, values in rates.items():
        ratio = medians["ours"] / medians[side]
        table.add_row(side, f"{medians[side]:.1f}", f"{min(values):.1f}", f"{max(values):.1f}", f"{ratio:.2f}")
    Console(width=120).print(table)
    return {side.replace(" ", "_"): round(value, 2) for side, value in medians.items()}


def main() -> None:
    """Run both cases and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, once: shows that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000, help="small JPEGs in tars, a multiple of 1,000")
    parser.add_argument("--engine-images", type=int, default=48, help="photographs for the real engine")
    parser.add_argument("--size", default="256m", help="the model of the engine case")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.repeats, arguments.images, arguments.engine_images, arguments.size = 1, 2000, 8, "tiny"
    ray.init(
        "local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        found = {
            setting.name: report(setting.name, measure(setting, sides, arguments.repeats))
            for setting, sides in settings(Path(folder), arguments)
        }
    ray.shutdown()
    first = found["standin"]
    versions = {"python": platform.python_version(), "ray": ray.__version__, "cpus": os.cpu_count()}
    peer = first["ray_read_webdataset"]
    print(
        json.dumps({"ours": first["ours"], "peer": peer, "ratio": round(first["ours"] / peer, 2), **found, **versions})
    )


if __name__ == "__main__":
    main()
