"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(200)
def test_pipeline_runs() -> None:
    command = [sys.executable, "benchmarks/pipeline.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["standin"]) == {"ours", "ray_read_webdataset", "plain_loop"}
    assert set(report["engine"]) == {"ours", "plain_loop"}
    assert report["ours"] > 0
    assert report["peer"] > 0
