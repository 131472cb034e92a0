"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(200)
def test_scaling_runs() -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["nodes"] for row in report["clusters"]] == [1, 2]
    assert [row["limit"] for row in report["clusters"]] == [100, 200]
    for row in report["clusters"]:
        assert 0 < row["images_per_s"] <= row["limit"] * 1.02  # nothing is faster than the engines sleep
    assert report["ours"] == report["clusters"][-1]["efficiency"]
