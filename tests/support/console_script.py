"""The console script as a user runs it, and what a small job needs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

SMOLVLM = Path(sys.executable).with_name("smolvlm")
Done = subprocess.CompletedProcess[str]


def smolvlm(*arguments: str | Path, **environment: str) -> Done:
    """Run it to its end, with these variables besides our own."""
    command = [str(SMOLVLM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def draw_images(folder: Path, count: int) -> Path:
    """Write so many small pictures and return their new folder."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20 + number % 50, 30), (number % 256, 100, 200)).save(folder / f"{number:04}.png")
    return folder


def write_job(folder: Path, checkpoint: Path, source: Path | str, **changes: Any) -> Path:
    """Write the file of a job with one short task and return its path; `changes` replace sections."""
    content = {
        "name": "test",
        "source": {"uri": str(source)},
        "output": {"uri": str(folder / "out"), "rows_per_file": 4},
        "model": {"id": str(checkpoint), "dtype": "float32"},
        "tasks": [{"name": "caption", "prompt": "What is this?", "max_new_tokens": 4}],
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
