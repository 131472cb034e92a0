"""What a run takes besides its images: a run on a single one, timed from the command to its end."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from pipeline.errors import ConfigError
from pipeline.job import Job, Limits, Output, Source


def measure_start(job: Job) -> float:
    """Return the seconds of `smolvlm run` with the job's model on one blank picture, with answers of one token.

    That is Python's and Ray's start, the actors' and the engine's, the output's end and Ray's. Nothing stays behind.
    Raises ConfigError if that run fails: the job's would too.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(asdict(_on_one_image(job, Path(folder)))))
        command = [sys.executable, "-m", "jobs", "run", str(path), "--json"]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise ConfigError(
                f"the job does not run on one blank picture (exit code {done.returncode}): {said[-1000:]}"
            )
        return time.monotonic() - started


def _on_one_image(job: Job, folder: Path) -> Job:
    (folder / "in").mkdir()
    Image.new("RGB", (64, 64), "white").save(folder / "in" / "blank.png")
    return replace(
        job,
        source=Source(str(folder / "in")),
        output=Output(str(folder / "out")),
        tasks=tuple(replace(task, max_new_tokens=1) for task in job.tasks),
        engine=replace(job.engine, mode="dedicated", replicas=(1, 1), cpus=None, prepare_workers=None),
        limit=None,
        limits=Limits(),
    )
