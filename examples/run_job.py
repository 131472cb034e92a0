"""Run a job from Python and read its rows: what `smolvlm run` does, without the command line.

python examples/run_job.py jobs/examples/receipts.yaml
python examples/run_job.py --smoke      # three drawn images and a tiny random checkpoint
"""

import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from jobs import spec
from jobs.progress import display, summary_text
from jobs.run import execute
from jobs.verify import verify
from pipeline.job import Job


def main() -> None:
    if sys.argv[1:] == ["--smoke"]:
        with tempfile.TemporaryDirectory() as folder:
            job = smoke_job(Path(folder))
            run(job)
            print_rows(Path(job.output.uri))
    elif len(sys.argv) == 2:
        run(spec.load(sys.argv[1]).to_job())
    else:
        sys.exit(__doc__)


def run(job: Job) -> None:
    """Run or resume `job` on this machine and check that every input has its row."""
    with display(sys.stdout) as shown:
        summary = execute(job, shown)
    print(summary_text(summary))
    report = verify(job.output.uri, job.output.endpoint_url)
    print(report.to_text())
    assert report.passed


def print_rows(output: Path) -> None:
    """Print what each image was answered."""
    for row in pq.read_table(output / "data").to_pylist():
        print(row["uri"], row["status"], row["width"], row["height"], row["caption"]["text"])


def smoke_job(folder: Path) -> Job:
    """Return a job on three drawn images, built from a mapping instead of a file."""
    from smolvlm.scratch import create_checkpoint

    (folder / "images").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), name).save(folder / "images" / f"{name}.png")
    content = {
        "name": "smoke",
        "source": {"uri": str(folder / "images")},
        "output": {"uri": str(folder / "rows")},
        "model": {"id": str(create_checkpoint(folder / "checkpoint", "tiny")), "dtype": "float32"},
        "tasks": [{"name": "caption", "prompt": "Describe this image.", "max_new_tokens": 8}],
    }
    return spec.parse(content).to_job()


if __name__ == "__main__":
    main()
