"""What a million inputs cost before the first image is read, and how much memory they take of the driver.

    python benchmarks/planning.py [--smoke] [--objects 10000 100000 1000000] [--model bundled]

The source is a bucket of synthetic objects: an S3 server in this process (`tests/support/synthetic_bucket.py`) makes
up its listing and puts the same small image behind every key. Requests, their XML, filters and manifest are the real
ones. Three cases, each in a fresh process, which reports its peak resident memory:

- `plan`: `smolvlm plan`: list everything, read 200 images of it, try the engine on some;
- `manifest`: what a run does before its first image: list everything, number it, write it down;
- `run`: a whole job over such a manifest, on a Ray of its own. `image.max_bytes` is below the size in the listing, so
  every row passes through Ray Data, both actor pools and Parquet, and none costs the reading of an image.

The last line of stdout is one JSON object.
"""

import argparse
import io
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring.stand_ins import use_stand_ins
from PIL import Image
from rich.console import Console
from rich.table import Table

use_stand_ins()
# The synthetic store takes any.
os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}

from synthetic_bucket import synthetic_bucket

from pipeline.job import ImageOptions, Job, Model, Output, Source, Task

Case = Callable[[Job], dict[str, Any]]
SAMPLE = 200


def plan_case(job: Job) -> dict[str, Any]:
    """Plan the job as `smolvlm plan` does."""
    from jobs.plan import Figures, Pool, plan, to_json

    said: list[float] = []
    found = to_json(plan(job, Pool(), Figures(), SAMPLE, lambda _: said.append(time.monotonic())))
    return {"objects": found["images"], "bytes": found["bytes"], "list_s": said[1] - said[0]}


def manifest_case(job: Job) -> dict[str, Any]:
    """List the source and write the manifest, as a run begins."""
    from pipeline.manifest import write_manifest
    from pipeline.source import manifest_tables
    from pipeline.storage import Location

    return {"objects": write_manifest(Location(job.output.uri), manifest_tables(job.source)).rows}


def run_case(job: Job) -> dict[str, Any]:
    """Run the job on a Ray of its own; every row is an error that the manifest foretold."""
    import ray
    from standin import PixelAnswerer

    from pipeline.run import run

    cpus = os.cpu_count()
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    idle = memory_mb("VmRSS")
    summary = run(job, answerer_factory=PixelAnswerer)
    assert summary.errors_by_code == {"too_many_bytes": summary.inputs}, summary
    ray.shutdown()
    return {"objects": summary.rows, "idle_mb": idle}


CASES: dict[str, Case] = {"plan": plan_case, "manifest": manifest_case, "run": run_case}


def memory_mb(name: str = "VmHWM") -> float:
    """Return this process's resident memory, by default its peak; getrusage would count that of the parent too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:")) / 1024


def job_of(case: str, objects: int, endpoint_url: str, model: str, output: str) -> Job:
    """Return the job of a case."""
    return Job(
        "planning",
        Source(f"s3://objects-{objects}/photos/", endpoint_url=endpoint_url),
        Output(output),
        Model(model, dtype="float32"),
        (Task("text", "Transcribe all text.", max_new_tokens=16),),
        ImageOptions(max_bytes=1) if case == "run" else ImageOptions(),
    )


def measure_here(case: str, objects: int, endpoint_url: str, model: str) -> None:
    """Run one case in this process and print what it took."""
    with tempfile.TemporaryDirectory() as output:
        started = time.monotonic()
        found = CASES[case](job_of(case, objects, endpoint_url, model, output))
        seconds = time.monotonic() - started
    assert found.pop("objects") == objects
    print(json.dumps({"seconds": seconds, "peak_mb": memory_mb(), **found}))


def measure(case: str, objects: int, endpoint_url: str, model: str) -> dict[str, float]:
    """Run one case in a fresh process and return what it took."""
    command = [sys.executable, __file__, "--case", case, "--objects", str(objects), "--model", model]
    done = subprocess.run([*command, "--endpoint", endpoint_url], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 2) for name, value in found.items()}


def picture() -> bytes:
    """Return a small PNG."""
    target = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def print_table(found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Print all cases for a person."""
    table = Table("case", "objects", "seconds", "objects/s", "peak memory, MB", title="planning")
    for case, rows in found.items():
        for objects, row in rows.items():
            rate = f"{objects / row['seconds']:,.0f}"
            table.add_row(case, f"{objects:,}", f"{row['seconds']:.1f}", rate, f"{row['peak_mb']:.0f}")
    Console(width=120).print(table)


def summary(found: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Return the JSON object: seconds of the largest plan, and how much memory grows from the fewest to the most."""
    most = max(found["plan"])
    growth = {case: rows[max(rows)]["peak_mb"] / rows[min(rows)]["peak_mb"] for case, rows in found.items()}
    return {
        "objects": most,
        "plan_s": found["plan"][most]["seconds"],
        "memory_growth": {case: round(value, 3) for case, value in growth.items()},
        "cases": found,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def main() -> None:
    """Measure all cases at all sizes and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few objects and a tiny model: shows that it runs")
    parser.add_argument("--objects", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", default="bundled", help="what `plan` tries: a checkpoint directory or `bundled`")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # a fresh process of `measure`
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure_here(arguments.case, arguments.objects[0], arguments.endpoint, arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder, synthetic_bucket(picture()) as bucket:
        if arguments.smoke:
            from smolvlm.scratch import create_checkpoint

            arguments.model, arguments.objects = str(create_checkpoint(Path(folder) / "tiny", "tiny")), [300, 3000]
        found = {
            case: {objects: measure(case, objects, bucket.url, arguments.model) for objects in arguments.objects}
            for case in CASES
        }
    print_table(found)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
