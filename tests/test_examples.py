"""Every example runs."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path), "--smoke"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_some() -> None:
    assert {path.name for path in EXAMPLES} >= {"ask_image.py", "run_job.py"}
