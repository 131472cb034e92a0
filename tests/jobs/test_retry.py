"""`smolvlm retry`: error rows run again, through kills, while readers look, until the output is what it should be."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from console_script import SMOLVLM
from driver import make_job
from PIL import Image
from standin import PixelAnswerer
from typer.testing import CliRunner

from jobs.cli import app
from jobs.verify import verify
from pipeline.job import Job, Source
from pipeline.run import run

DRIVER = Path(__file__).parents[1] / "support" / "retry_driver.py"
IMAGES, MISSING, BROKEN = 96, range(0, 96, 2), range(1, 96, 24)


def draw(folder: Path, numbers: range) -> None:
    for number in numbers:
        Image.new("RGB", (20 + number, 30), (number, 100, 200)).save(folder / f"{number:04}.png")


@pytest.fixture
def job(tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str) -> Job:
    """A finished job: half of its images were not there, some are broken, and one tar was cut when it was listed."""
    folder = tmp_path / "in"
    folder.mkdir()
    draw(folder, range(1, IMAGES, 2))
    for number in BROKEN:
        (folder / f"{number:04}.png").write_bytes(b"not an image")
    (folder / "cut.tar").write_bytes(b"x" * 700)
    uris = [*(str(folder / f"{number:04}.png") for number in range(IMAGES)), str(folder / "cut.tar")]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"uri": uri}) for uri in uris))
    base = make_job(str(tmp_path / "list.jsonl"), str(tmp_path / "out"), str(tiny_checkpoint))
    job = Job(base.name, Source(base.source.uri, "list"), base.output, base.model, base.tasks)
    done = run(job, answerer_factory=PixelAnswerer)
    assert done.errors_by_code == {"not_found": 48, "not_an_image": 4, "archive_invalid": 1}
    return job


def rows_of(job: Job) -> dict[str, str]:
    """Each input's text or error code, read as a reader does; fails on an input with two rows."""
    files = [path for path in Path(job.output.uri, "data").iterdir() if not path.name.startswith(".")]
    rows = [row for path in files for row in pq.ParquetFile(path).read().to_pylist()]
    found = {Path(row["uri"]).name: row["caption"]["text"] if row["caption"] else row["error"]["code"] for row in rows}
    assert len(rows) == len(found) == IMAGES + 1
    return found


def test_kills_at_random_moments_while_readers_look(job: Job, ray_cluster: str, tmp_path: Path) -> None:
    before, rng = rows_of(job), random.Random(1)
    draw(tmp_path / "in", MISSING)
    stop, failures, looks = threading.Event(), list[BaseException](), list[int]()

    def look() -> None:
        try:
            while not stop.is_set():
                looks.append(len(rows_of(job)))
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    command = [sys.executable, str(DRIVER), ray_cluster, job.output.uri]
    for _ in range(3):
        process = subprocess.Popen([*command, "0.2"], stdout=subprocess.PIPE)
        lease = len(list(Path(job.output.uri, "_lease").iterdir()))
        while process.poll() is None and len(list(Path(job.output.uri, "_lease").iterdir())) == lease:
            time.sleep(0.02)
        time.sleep(rng.random() * 6)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=200)
    stop.set()
    reader.join()
    assert done.returncode == 0, done.stderr
    assert failures == []
    assert len(looks) > 10
    assert json.loads(done.stdout.splitlines()[-1])["error"] == 5
    after = rows_of(job)
    missing = {f"{number:04}.png" for number in MISSING}
    assert {name for name in before if before[name] != after[name]} == missing
    assert all(after[name].startswith("Describe") for name in missing)
    assert verify(job.output.uri).passed
    assert not list(Path(job.output.uri).glob("_retry/data/*.parquet"))


def test_the_command_by_code(job: Job, ray_cluster: str, tmp_path: Path) -> None:
    draw(tmp_path / "in", MISSING)
    command = [str(SMOLVLM), "retry", job.output.uri, "--json", "--address", ray_cluster, "--max-error-share", "0.1"]

    def retried(*codes: str) -> dict[str, object]:
        options = [part for code in codes for part in ("--code", code)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200, env=os.environ)
        assert done.returncode == 0, done.stderr
        content: dict[str, object] = json.loads(done.stdout)
        return {key: content[key] for key in ("retried", "recovered", "hopeless", "error")}

    success = Path(job.output.uri, "_SUCCESS.json")
    digests = json.loads(success.read_text())["files"]
    assert retried("not_found", "not_an_image") == {"retried": 52, "recovered": 48, "hopeless": 0, "error": 5}
    assert verify(job.output.uri).passed
    assert json.loads(success.read_text())["files"].keys() == digests.keys()
    stamp = success.stat().st_mtime_ns
    assert retried("archive_invalid", "not_found") == {"retried": 0, "recovered": 0, "hopeless": 1, "error": 5}
    assert success.stat().st_mtime_ns == stamp


def test_mistakes(tmp_path: Path) -> None:
    for arguments, message in {
        ("none",): "no _job.json here",
        ("none", "--code", "decode_faild"): "did you mean decode_failed?",
    }.items():
        done = CliRunner().invoke(app, ["retry", str(tmp_path / arguments[0]), *arguments[1:]])
        assert done.exit_code == 2
        assert message in done.stderr
