"""Engines and inputs on the tiny checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import Engine, Processor
from smolvlm.engine import EngineLoop
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput


@pytest.fixture(scope="session")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def make_tiles(processor: Processor) -> MakeTiles:
    def make(rows: int = 0, cols: int = 0, seed: int = 0) -> Tiles:
        side = processor.config.image.tile_size
        shape = (rows * cols + 1, side, side, 3)
        return Tiles(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), rows, cols)

    return make


@pytest.fixture(scope="session")
def make_input(processor: Processor) -> MakeInput:
    def make(*tiles: Tiles, text: str = "What is this?") -> ModelInput:
        content = [{"type": "image"} for _ in tiles] + [{"type": "text", "text": text}]
        return processor.from_tiles([{"role": "user", "content": content}], tiles)

    return make


@pytest.fixture(scope="session")
def make_engine(tiny_checkpoint: Path) -> MakeEngine:
    def make(**options: Any) -> Engine:
        return Engine.from_pretrained(tiny_checkpoint, **options)

    return make


@pytest.fixture
def engine(make_engine: MakeEngine) -> Iterator[Engine]:
    """An engine that must have given everything back at the end."""
    engine = make_engine(max_num_sequences=4)
    yield engine
    assert not engine.has_unfinished
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert len(engine.scheduler.images) == 0


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    with EngineLoop(engine) as loop:
        yield loop


@pytest.fixture
def question(make_input: MakeInput, make_tiles: MakeTiles) -> ModelInput:
    return make_input(make_tiles(seed=1))
