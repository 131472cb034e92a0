"""A short soak: workers, a node and a driver are lost, and no row is lost, doubled or wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_every_row_outlives_workers_a_node_and_a_driver() -> None:
    command = [sys.executable, "benchmarks/faults.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["strikes"] == {"worker": 2, "node": 1, "driver": 1}
    assert report["rows"] == report["images"] == 300
    assert (report["lost"], report["doubled"], report["wrong"], report["unreadable_files"]) == (0, 0, 0, 0)
    assert 0 < report["resumed"] < 300
    assert report["answers"] >= 294  # of six broken images there is none
