"""Engines and inputs on the tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolvlm import Engine, Processor
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput

MakeTiles = Callable[..., Tiles]
MakeInput = Callable[..., ModelInput]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def make_tiles(processor: Processor) -> MakeTiles:
    """Tiles of noise: rows × cols and the global one, another noise for another seed."""

    def make(rows: int = 0, cols: int = 0, seed: int = 0) -> Tiles:
        side = processor.config.image.tile_size
        shape = (rows * cols + 1, side, side, 3)
        return Tiles(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), rows, cols)

    return make


@pytest.fixture(scope="session")
def make_input(processor: Processor) -> MakeInput:
    """A prompt with these images and this text."""

    def make(*tiles: Tiles, text: str = "What is this?") -> ModelInput:
        content = [{"type": "image"} for _ in tiles] + [{"type": "text", "text": text}]
        return processor.from_tiles([{"role": "user", "content": content}], tiles)

    return make


@pytest.fixture(scope="session")
def make_engine(tiny_checkpoint: Path) -> MakeEngine:
    def make(**options: Any) -> Engine:
        return Engine.from_pretrained(tiny_checkpoint, **options)

    return make
