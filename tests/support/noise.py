"""Small pictures of noise, no two alike."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_noise(folder: Path, count: int) -> Path:
    """Write `count` PNGs of 32×24 pixels, named by their number, and return the folder."""
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"{index:04d}.png")
    return folder
