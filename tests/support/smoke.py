"""A benchmark's short run, as its own process, and the JSON object of its last line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def smoke_report(script: str, *arguments: str, timeout_s: float, **variables: str) -> dict[str, Any]:
    """Run `benchmarks/SCRIPT … --smoke` in this environment and `variables`; it must end well."""
    command = [sys.executable, f"benchmarks/{script}", *arguments, "--smoke"]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
