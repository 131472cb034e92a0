import gc

import numpy as np
import pytest

from smolvlm.engine.prefix import BlockKeys, TileNames, by_content, by_identity
from smolvlm.image import Tiles

IMAGE = 99


def _tiles(value: int = 0, count: int = 2) -> Tiles:
    return Tiles(np.full((count, 4, 4, 3), value, dtype=np.uint8), 0, 0)


def _keys(tokens: list[int], *names: bytes) -> list[bytes]:
    """Keys in blocks of 4, three image tokens a tile."""
    keys = BlockKeys(4, IMAGE, 3, list(names))
    keys.extend(tokens)
    return [keys[index] for index in range(len(keys))]


def test_only_full_blocks_have_keys() -> None:
    assert [len(_keys(list(range(length)))) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_agree_as_far_as_tokens_do() -> None:
    ours, theirs = _keys([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]), _keys([1, 2, 3, 4, 5, 6, 7, 0, 9, 9, 9, 9])
    assert [one == other for one, other in zip(ours, theirs, strict=True)] == [True, False, False]


def test_extending_gives_what_all_at_once_gives() -> None:
    tokens = [1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3, 4, 5, 6, 7]
    keys = BlockKeys(4, IMAGE, 3, [b"x", b"y"])
    for length in (2, 5, 9, 13):
        keys.extend(tokens[:length])
    assert [keys[index] for index in range(len(keys))] == _keys(tokens, b"x", b"y")


@pytest.mark.parametrize(
    ("names", "agree"),
    [
        ((b"x", b"y", b"z"), [True, True, True, True]),
        ((b"?", b"y", b"z"), [False, False, False, False]),
        ((b"x", b"?", b"z"), [True, False, False, False]),
        ((b"x", b"y", b"?"), [True, True, False, False]),
    ],
)
def test_a_tile_counts_from_the_block_with_its_first_token(names: tuple[bytes, ...], agree: list[bool]) -> None:
    """Blocks: 1 x x x | y y y 2 | z z z 3 | 4 5 6 7."""
    tokens = [1, *[IMAGE] * 6, 2, *[IMAGE] * 3, 3, 4, 5, 6, 7]
    pairs = zip(_keys(tokens, b"x", b"y", b"z"), _keys(tokens, *names), strict=True)
    assert [ours == theirs for ours, theirs in pairs] == agree


def test_a_tile_across_a_border_counts_in_both_blocks() -> None:
    tokens = [1, 2, IMAGE, IMAGE, IMAGE, 3, 4, 5]
    assert [one == other for one, other in zip(_keys(tokens, b"x"), _keys(tokens, b"y"), strict=True)] == [False] * 2


def test_a_generated_image_token_is_not_a_tile() -> None:
    assert _keys([1, 2, 3, IMAGE]) != _keys([1, 2, 3, IMAGE], b"x")


def test_equal_pixels_have_equal_digests_and_other_objects_other_identities() -> None:
    assert by_content(_tiles(1)) == by_content(_tiles(1))
    assert by_content(_tiles(1)) != by_content(_tiles(2))
    assert by_identity(_tiles(1)) != by_identity(_tiles(1))
    assert [len(set(make(_tiles(count=3)))) for make in (by_content, by_identity)] == [1, 1]


def test_digests_are_those_of_the_pixels_however_they_lie_in_memory() -> None:
    tiles = Tiles(np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8), 0, 0)
    turned = Tiles(np.asfortranarray(tiles.pixels), 0, 0)
    assert by_content(turned) == by_content(tiles)


def test_names_are_made_once_for_each_object_and_go_with_it() -> None:
    made: list[int] = []

    def make(tiles: Tiles) -> list[bytes]:
        made.append(int(tiles.pixels[0, 0, 0, 0]))
        return by_identity(tiles)

    names, tiles = TileNames(make), _tiles(1)
    assert names(tiles) is names(tiles)
    assert names(_tiles(2)) != names(tiles)
    del tiles
    gc.collect()
    assert (made, len(names._known)) == ([1, 2], 0)
