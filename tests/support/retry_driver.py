"""A driver process that retries a destination with the stand-in engine on a cluster that is already there."""

import functools
import json
import logging
import sys

import ray
from standin import PixelAnswerer

from jobs.shortcuts import Options
from jobs.stored import stored_job
from pipeline.retry import retry


def main() -> None:
    """Retry all errors of argv[2] on the cluster argv[1], argv[3] seconds an answer, and print what was done."""
    ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    job = stored_job(sys.argv[2]).to_run(Options())
    done = retry(job, answerer_factory=functools.partial(PixelAnswerer, delay_s=float(sys.argv[3])))
    print(json.dumps({"retried": done.retried, "recovered": done.recovered, "error": done.error}), flush=True)


if __name__ == "__main__":
    main()
