"""The benchmark runs and ends with its JSON line; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

from smolvlm.cpu.linear import has_int8

ROOT = Path(__file__).parents[2]


def test_every_way_of_rounding_reads_the_same_documents() -> None:
    command = [sys.executable, "benchmarks/rounding.py", "--smoke", "--text", "README.md"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    exact = report["ways"].pop("float32")
    assert exact["logits_error"] == {"median": 0.0, "highest": 0.0}
    assert exact["equal"] == report["documents"] == 2
    assert set(report["ways"]) == {"bfloat16", "fp8 encoder", "fp8 cache", "both", *(["int8"] if has_int8() else [])}
    for rounded in report["ways"].values():
        assert 0 < rounded["logits_error"]["median"] <= rounded["logits_error"]["highest"]
    assert report["text"]["float32"]["likeliest"] == 1.0
    assert report["text"]["fp8 cache"]["perplexity"] != report["text"]["float32"]["perplexity"]
