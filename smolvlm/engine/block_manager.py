"""Which pages of the key/value cache are free, whose the others are, and what full ones hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Hands out block numbers 0..num_blocks-1 of `block_size` tokens each.

    A sequence gets all the blocks that it can ever need at once, so that none has to be thrown out half-way. Sequences
    with a common beginning refer to the same blocks for it. A block that nobody refers to is free, yet what it holds
    can be found by its key (smolvlm.engine.prefix) until it is handed out for something else.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # handed out from the front
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks that hold what the first of these keys stand for, up to the first key that is unknown."""
        found = []
        for key in keys:
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
        return found

    def remember(self, block: int, key: bytes) -> None:
        """This block is full and will not change; where the key is known already, the older block stays the known."""
        if self._blocks.setdefault(key, block) == block:
            self._keys[block] = key

    def allocate(self, num_tokens: int, prefix: Sequence[int] = (), spare: int = 0) -> list[int] | None:
        """Blocks for `num_tokens`, of which `prefix` are found ones; None where fewer than `spare` would stay free."""
        count = self.num_needed(num_tokens) - len(prefix)
        taken = count + sum(self._references[block] == 0 for block in prefix)
        if taken + spare > len(self._free):
            return None
        for block in prefix:
            self._refer(block)
        return [*prefix, *(self._hand_out() for _ in range(count))]

    def exchange(self, table: list[int], start: int, found: Sequence[int]) -> None:
        """Put found blocks into a table from `start` on, in place of its own."""
        for block in found:
            self._refer(block)
        own = table[start : start + len(found)]
        table[start : start + len(found)] = found
        self.release(own, keep=False)

    def release(self, blocks: list[int], keep: bool = False) -> None:
        """Take references back and empty the list: who held them holds them no more.

        With `keep`, known blocks are handed out again only after all that became free earlier, the later tokens' first:
        a block is of no use without those before it. Without, they are the next to be handed out.
        """
        for block in reversed(blocks) if keep else blocks:
            assert self._references[block] > 0, "a block was released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=keep and block in self._keys)
        blocks.clear()

    def _refer(self, block: int) -> None:
        self._references[block] += 1
        self._free.pop(block, None)

    def _hand_out(self) -> int:
        block, _ = self._free.popitem(last=False)
        if (key := self._keys.pop(block, None)) is not None:
            del self._blocks[key]
        self._references[block] = 1
        return block
