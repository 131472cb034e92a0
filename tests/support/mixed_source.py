"""What plans are tried on: a folder of all that a source may hold, a job on it, and the recorded figures of a GPU."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tars import tar_of

from jobs.plan_profile import Profile, TaskLength
from pipeline.job import EngineOptions, Job, Model, Output, Source, Task
from smolvlm.image import Tiles

CAPTION = Task("caption", "Describe this image.", max_new_tokens=8)
OCR = Task("ocr", "Transcribe all text.", max_new_tokens=16)
ON_CPU = EngineOptions()
BLANK = Tiles(np.zeros((2, 4, 4, 3), np.uint8), 1, 1)


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """An image file of noise, the same for the same size."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(width * 10_000 + height)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_mixed(folder: Path) -> Path:
    """Fill a new folder: images of two formats, two of them broken, a tar, one with a doubled key, and Parquet."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.png").write_bytes(picture(40 + number, 30))
    for number in range(10):
        (folder / f"large-{number}.jpg").write_bytes(picture(300, 200 + number, "JPEG"))
    (folder / "broken-a.jpg").write_bytes(b"no image")
    (folder / "broken-b.png").write_bytes(picture(50, 50)[:-40])
    one, other = picture(20, 20), picture(21, 20)
    (folder / "whole.tar").write_bytes(tar_of((f"{i}.png", picture(30, 20 + i)) for i in range(12)))
    (folder / "doubled.tar").write_bytes(tar_of([("a.png", one), ("b.png", other), ("a.png", one)]))
    pq.write_table(pa.table({"image": [picture(25, 25 + i) for i in range(9)]}), folder / "cells.parquet")
    return folder


def job_of(source: Path, checkpoint: Path, *tasks: Task, engine: EngineOptions = ON_CPU) -> Job:
    """A job on that source; its output would lie beside it."""
    output = Output(str(source.parent / "out"))
    model = Model(str(checkpoint), dtype="float32")
    return Job("plan", Source(str(source)), output, model, tasks or (CAPTION,), engine=engine)


def profile_of(job: Job) -> Profile:
    """Figures as if recorded on an H100 with the model of this job."""
    return Profile(
        hardware="NVIDIA H100 80GB HBM3",
        device="cuda",
        model_id=job.model.id,
        revision=job.model.revision,
        dtype=job.model.dtype,
        quantization=job.model.quantization,
        kv_cache_dtype=job.model.kv_cache_dtype,
        sequences=256,
        tile_s=0.5,
        output_token_s=0.25,
        rounds=3,
        spread=0.0,
        load_s=20.0,
        start_s=36.0,
        lengths=tuple(TaskLength(task.prompt, task.max_new_tokens, 6.0, 0.5) for task in job.tasks),
        version="0",
        torch="2",
    )
