"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_policies_read_the_same_files() -> None:
    command = [sys.executable, "benchmarks/fast_texts.py", "--smoke"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["documents"] == report["reduced"] == 4
    assert 0 <= report["equal"] <= 1
    assert set(report["cer"]) == {"exact", "fast"}
