"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_engine_runs() -> None:
    command = [sys.executable, "benchmarks/engine.py", "--smoke", "--tiles", "5"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ratio"] == pytest.approx(report["ours"] / report["peer"], abs=1e-3)
    assert report["same_tokens"] == 1.0
    assert set(report["details"]) == {"ours", "transformers"}
    assert all(seconds > 0 for side in report["details"].values() for seconds in side["phase_s"].values())
