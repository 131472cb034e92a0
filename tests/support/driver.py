"""A driver process for the fault tests: runs a job with the stand-in engine on a cluster that is already there."""

import functools
import json
import logging
import sys
from pathlib import Path

import ray
from standin import PixelAnswerer

from pipeline.errors import PipelineError
from pipeline.job import Job, Model, Output, Source, Task
from pipeline.run import run


def make_job(source: str, output: str, checkpoint: str, prompt: str = "Describe.") -> Job:
    """Return the job that all fault tests run."""
    return Job(
        "faults", Source(source), Output(output, rows_per_file=16), Model(checkpoint), (Task("caption", prompt),)
    )


def main() -> int:
    """Run it; print `running` once the workers answer, and at the end the error's class or `done`."""
    address, source, output, checkpoint, delay_s, log, limit, prompt = sys.argv[1:]
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    answerer = functools.partial(PixelAnswerer, delay_s=float(delay_s), log=Path(log), limit=Path(limit))
    try:
        summary = run(make_job(source, output, checkpoint, prompt), answerer_factory=answerer)
    except PipelineError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
        return 2
    print(json.dumps({"rows": summary.rows, "resumed": summary.resumed_rows}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
