"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_prepare_runs() -> None:
    command = [sys.executable, "benchmarks/prepare.py", "--smoke", "--repeats", "2"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ratio"] == report["ours"] / report["peer"]
    assert report["fast_ratio"] == report["fast"] / report["ours"]
    assert len(report["cases"]) == 9
    assert all(min(case["ours"], case["fast"], case["peer"]) > 0 for case in report["cases"].values())
    assert all(0 < case["difference"]["mean"] < 10 for case in report["cases"].values())
