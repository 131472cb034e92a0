"""Memory that is lent: whoever holds a piece of it keeps it, and it comes back once nobody does."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.decoder_child import TileMemory


@pytest.fixture
def memory() -> Iterator[TileMemory]:
    memory = TileMemory()
    os.pwrite(memory.fileno(), bytes(range(12)), 0)
    yield memory
    memory.close()


def test_it_comes_back_with_the_last_view(memory: TileMemory) -> None:
    returned: list[TileMemory] = []
    lent = memory.lend(12, returned.append)
    cut = lent.reshape(3, 2, 2)[1:]
    del lent
    seen = cut.data
    np.testing.assert_array_equal(cut[0], [[4, 5], [6, 7]])
    del cut
    assert returned == []
    assert seen.tobytes() == bytes(range(4, 12))
    seen.release()
    assert returned == [memory]


def test_it_is_for_looking_only(memory: TileMemory) -> None:
    with pytest.raises(ValueError, match="read-only"):
        memory.lend(12, lambda memory: None)[0] = 1


def test_what_is_lent_outlasts_a_larger_batch_and_the_end(memory: TileMemory) -> None:
    lent = memory.lend(12, lambda memory: None)
    os.pwrite(memory.fileno(), bytes(5000), 12)
    assert memory.read(5000)[:12] == bytes(range(12))
    memory.close()
    assert lent.tolist() == list(range(12))
