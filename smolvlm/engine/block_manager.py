"""Which pages of the key/value cache are free, and whose the others are."""

from __future__ import annotations


class BlockManager:
    """Hands out block numbers 0..num_blocks-1 of `block_size` tokens each.

    A sequence gets all the blocks that it can ever need at once, so that none has to be thrown out half-way.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> list[int] | None:
        """Blocks for `num_tokens`, or None while too few are free."""
        count = self.num_needed(num_tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Take blocks back and empty the list: who held them holds them no more."""
        self._free.extend(reversed(blocks))
        blocks.clear()
        assert len(self._free) <= self.num_blocks, "a block was released twice"
