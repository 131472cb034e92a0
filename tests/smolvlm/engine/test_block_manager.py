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


def _keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def _filled(blocks: BlockManager, *names: str) -> list[int]:
    """Allocate a block for each name and remember it by that."""
    mine = blocks.allocate(len(names) * blocks.block_size) or []
    for block, key in zip(mine, _keys(*names), strict=True):
        blocks.remember(block, key)
    return mine


def test_a_known_beginning_is_shared_until_its_last_user_leaves() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    first = _filled(blocks, "a", "b", "c")
    found = blocks.find(_keys("a", "b", "x", "c"))
    assert found == first[:2]
    second = blocks.allocate(16, found) or []
    assert (second[:2], blocks.num_free) == (found, 1)
    blocks.release(first, keep=True)
    assert blocks.num_free == 2
    blocks.release(second, keep=True)
    assert blocks.num_free == 6
    assert blocks.find(_keys("a", "b", "c")) == [*found, blocks.find(_keys("c"))[0]]


def test_free_blocks_that_are_found_again_count_as_taken() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    blocks.release(_filled(blocks, "a", "b", "c"), keep=True)
    found = blocks.find(_keys("a", "b", "c"))
    assert blocks.allocate(16, found, spare=1) is None
    assert blocks.num_free == 4
    assert (blocks.allocate(16, found) or [])[:3] == found


def test_the_longest_unused_goes_first_and_an_end_before_its_beginning() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    for names in ("ab", "cd", "ef"):
        blocks.release(_filled(blocks, *names), keep=True)
    used_again = blocks.allocate(8, blocks.find(_keys("a", "b"))) or []
    blocks.release(used_again, keep=True)
    left = ["abcdef", "abcef", "abef", "abe", "ab", "a", ""]
    for count, names in enumerate(left):
        assert "".join(name for name in "abcdef" if blocks.find(_keys(name))) == names
        assert (blocks.allocate(4) is None) == (count == 6)


def test_what_is_not_kept_goes_before_what_is() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    blocks.release(_filled(blocks, "a", "b"), keep=True)
    blocks.release(_filled(blocks, "c", "d"), keep=False)
    assert blocks.find(_keys("c", "d")) != []
    blocks.allocate(4)
    assert [len(blocks.find(_keys(name))) for name in "abcd"] == [1, 1, 1, 0]


def test_the_older_of_two_equal_blocks_stays_the_known_one() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    first, second = _filled(blocks, "a"), _filled(blocks, "a")
    assert blocks.find(_keys("a")) == first
    blocks.release(second, keep=True)
    blocks.allocate(8)
    assert blocks.find(_keys("a")) == first


def test_found_blocks_take_the_place_of_own_ones() -> None:
    blocks = BlockManager(num_blocks=5, block_size=4)
    first, second = _filled(blocks, "a", "b"), blocks.allocate(12) or []
    last = second[2]
    blocks.exchange(second, 0, blocks.find(_keys("a", "b")))
    assert second == [*first, last]
    assert blocks.num_free == 2
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_free == 5


def test_releasing_twice_is_a_bug_that_shows() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    mine = blocks.allocate(8) or []
    again = list(mine)
    blocks.release(mine)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(again)
