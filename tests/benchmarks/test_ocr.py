"""The comparison with Tesseract runs and ends with its JSON line; its figures are not judged here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/ocr.py", "--smoke"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=550)


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract (Debian: tesseract-ocr)")
def test_both_read_the_same_files() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    overall = report["kinds"]["overall"]["all"]
    assert set(report["settings"]) == set(report["kinds"]) - {"overall"} <= {"word", "line"}
    assert overall["ours"]["documents"] == overall["tesseract"]["documents"] == 6
    assert overall["ours"]["characters"] == overall["tesseract"]["characters"] > 0
    assert report["ratio"] == pytest.approx(report["ours"] / report["peer"])
    clean = report["kinds"]["overall"]["clean"]
    assert clean["tesseract"]["cer"]["value"] < 0.3 < clean["ours"]["cer"]["value"]  # one reads, the other is random
    assert report["versions"]["tesseract"].startswith("tesseract 5")
    assert all(seconds > 0 for seconds in report["seconds_per_image"].values())


def test_without_tesseract_it_says_what_to_install(tmp_path: Path) -> None:
    done = run(PATH=str(tmp_path))
    assert done.returncode == 1
    assert "tesseract is not installed: apt-get install tesseract-ocr" in done.stderr
    assert done.stdout == ""
