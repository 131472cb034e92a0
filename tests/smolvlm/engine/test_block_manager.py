import pytest

from smolvlm.engine.block_manager import BlockManager


def test_blocks_belong_to_one_owner_at_a_time() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    first, second = blocks.allocate(9), blocks.allocate(12)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == list(range(6))
    assert blocks.allocate(1) is None
    blocks.release(first)
    assert first == []
    assert blocks.num_free == 3


@pytest.mark.parametrize(("tokens", "needed"), [(1, 1), (4, 1), (5, 2), (24, 6)])
def test_tokens_are_rounded_up_to_blocks(tokens: int, needed: int) -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    assert blocks.num_needed(tokens) == needed
    assert len(blocks.allocate(tokens) or []) == needed


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    assert blocks.allocate(9) is None
    assert blocks.num_free == 2


def test_releasing_twice_is_a_bug_that_shows() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    mine = blocks.allocate(8) or []
    again = list(mine)
    blocks.release(mine)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(again)
