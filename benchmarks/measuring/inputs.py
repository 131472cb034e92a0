"""Prompts for timing an engine: images of noise in the wanted number of tiles, and as much text as wanted."""

from pathlib import Path

import numpy as np

from smolvlm import Processor
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput

QUESTION = "Describe this image."


def make_inputs(checkpoint: Path, num_tiles: int, batch: int, context: int) -> list[ModelInput]:
    """Prompts over images of noise, each with `num_tiles` tiles in a grid as square as possible."""
    text = " ".join(["page"] * context + [QUESTION])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    processor = Processor.from_pretrained(checkpoint)
    rows, cols = grid_of(num_tiles)
    side = processor.config.image.tile_size
    rng = np.random.default_rng(0)
    shape = (num_tiles, side, side, 3)
    images = [Tiles(rng.integers(0, 256, shape, dtype=np.uint8), rows, cols) for _ in range(batch)]
    return [processor.from_tiles(messages, [image]) for image in images]


def grid_of(num_tiles: int) -> tuple[int, int]:
    """Rows and columns of an image with this many tiles, the global one included.

    Raises:
        ValueError: no grid of at most 6 × 6 has so many.
    """
    if num_tiles == 1:
        return 0, 0
    grids = [(rows, cols) for rows in range(1, 7) for cols in range(rows, 7) if rows * cols + 1 == num_tiles]
    if not grids:
        raise ValueError(f"--tiles is {num_tiles}; it must be 1, or rows × columns + 1 with both at most 6, such as 13")
    return grids[-1]
