"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_serve_runs() -> None:
    command = [sys.executable, "benchmarks/serve.py", "--smoke"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ratio"] == pytest.approx(report["ours"] / report["peer"], abs=1e-2)
    ours = report["details"]["ours"]
    assert 0 < ours["overhead_ms"]["gateway_50"] < ours["overhead_ms"]["total_50"]
    assert ours["first_token_s"]["idle"]["requests"] == 3
    assert all(speed > 0 for speed in ours["batch_tokens_per_s"].values())
