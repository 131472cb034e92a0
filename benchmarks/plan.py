"""What `smolvlm plan` foretells against what `smolvlm run` then takes, on three kinds of sources.

    python benchmarks/plan.py [--smoke] [--photos N] [--documents N] [--words N] [--model bundled]

The sources are made on the spot: photographs in a tar, pictures of documents in Parquet, and a list of files with a
word or a line on each. Each is planned and then run from the command line, with the real engine on this machine's
CPUs. `ratio` is the planned time over the measured one, both from the command to its end, Python's and Ray's start
included; the last line of stdout is one JSON object.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch

from jobs.generated import draw
from jobs.shortcuts import OCR
from smolvlm.scratch import create_checkpoint
from smolvlm.training.documents import DocumentOptions

Write = Callable[[Path, int], Path]


def photos_in_a_tar(folder: Path, images: int) -> Path:
    """Write JPEGs with the statistics of photographs into one tar."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for index in range(images):
            target = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(target, "JPEG", quality=85)
            info = tarfile.TarInfo(f"{index:06}.jpg")
            info.size = target.tell()
            archive.addfile(info, io.BytesIO(target.getvalue()))
    return folder / "photos.tar"


def documents_in_parquet(folder: Path, images: int) -> Path:
    """Write receipts, forms, tables and other documents into one Parquet file."""
    cells = [document.data for document in draws(images, DocumentOptions())]
    pq.write_table(pa.table({"image": cells}), folder / "documents.parquet", row_group_size=100)
    return folder / "documents.parquet"


def words_in_files(folder: Path, images: int) -> Path:
    """Write pictures of a word or a line as files, and a list that names them."""
    options = DocumentOptions(kinds={"word": 1.0, "line": 1.0})
    lines = []
    for index, document in enumerate(draws(images, options)):
        path = folder / f"{index:06}.png"
        path.write_bytes(document.data)
        lines.append(json.dumps({"uri": str(path)}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def draws(images: int, options: DocumentOptions) -> Iterator[Any]:
    """Yield documents that training never showed."""
    return draw("held_out", 1, images, options)


SOURCES: dict[str, Write] = {"photos": photos_in_a_tar, "documents": documents_in_parquet, "words": words_in_files}


def smolvlm(command: str, job: Path, *options: str) -> tuple[dict[str, Any], float]:
    """Run `smolvlm COMMAND JOB --json` and return the last object that it prints, and the seconds it took."""
    arguments = [sys.executable, "-m", "jobs", command, str(job), "--json", *options]
    started = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"smolvlm {command} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    seconds = time.monotonic() - started
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, seconds


def measure(name: str, images: int, model: str, tokens: int, folder: Path, *options: str) -> dict[str, Any]:
    """Make a source, plan it with `options`, run it, and return both."""
    (folder / name).mkdir()
    content = {
        "name": name,
        "source": {"uri": str(SOURCES[name](folder / name, images))},
        "output": {"uri": str(folder / f"{name}-out")},
        "model": {"id": model, "dtype": "float32"},
        "tasks": [OCR | {"max_new_tokens": tokens}],
    }
    job = folder / f"{name}.json"
    job.write_text(json.dumps(content))
    (planned, _), (ran, measured_s) = smolvlm("plan", job, *options), smolvlm("run", job)
    assert planned["images"] == ran["rows"] == images, (planned, ran)
    planned_s = 3600 * planned["hours"]
    print(f"{name}: planned {planned_s:.0f} s, measured {measured_s:.0f} s", flush=True)
    return {
        "images": images,
        "planned_s": round(planned_s, 1),
        "planned_interval_s": [round(3600 * hours, 1) for hours in planned["hours_interval"]],
        "measured_s": round(measured_s, 1),
        "ratio": round(planned_s / measured_s, 3),
        "planned_tokens": round(planned["output_tokens_per_image"], 1),
        "measured_tokens": round(ran["output_tokens"] / images, 1),
        "images_per_second": round(planned["images_per_second"], 2),
        "start_s": round(planned["start_seconds"], 1),
        "calibration_spread": round(planned["calibration_spread"], 3),
        "warnings": planned["warnings"],
    }


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """Print all sources for a person."""
    table = Table("source", "images", "planned, s", "measured, s", "planned / measured", "tokens", title="plan")
    for name, row in found.items():
        tokens = f"{row['planned_tokens']} / {row['measured_tokens']}"
        times = (f"{row['planned_s']:.0f}", f"{row['measured_s']:.0f}", f"{row['ratio']:.2f}")
        table.add_row(name, f"{row['images']:,}", *times, tokens)
    Console(width=120).print(table)


def main() -> None:
    """Plan and run all sources and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few images and a tiny model: shows that it runs")
    parser.add_argument("--photos", type=int, default=1500)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--model", default="bundled", help="a checkpoint directory or `bundled`")
    arguments = parser.parse_args()
    tokens = 128
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            tokens = 16
            arguments.photos = arguments.documents = arguments.words = 40
            arguments.model = str(create_checkpoint(Path(folder) / "tiny", "tiny"))
        found: dict[str, Any] = {}
        for name in SOURCES:
            # Trying the engine takes most of a small run: the first source's figures serve the others.
            option = "--profile" if found else "--save-profile"
            options = [option, str(Path(folder) / "profile.json")] if arguments.smoke else []
            images = getattr(arguments, name)
            found[name] = measure(name, images, arguments.model, tokens, Path(folder), *options)
    print_table(found)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    print(json.dumps({"ratios": {name: row["ratio"] for name, row in found.items()}, "sources": found, **versions}))


if __name__ == "__main__":
    main()
