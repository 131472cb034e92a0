"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_three_sources_are_planned_and_run() -> None:
    command = [sys.executable, "benchmarks/plan.py", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["sources"]) == {"photos", "documents", "words"}
    for name, row in report["sources"].items():
        assert row["images"] == 40
        assert row["ratio"] == pytest.approx(row["planned_s"] / row["measured_s"], rel=0.05)
        assert report["ratios"][name] == row["ratio"]
        assert row["planned_interval_s"][0] <= row["planned_s"] <= row["planned_interval_s"][1]
        assert row["measured_tokens"] > 0
