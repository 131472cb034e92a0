"""Where the characters are: on pictures made by hand, once as a single tile and once split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smolvlm.config import ModelConfig
from smolvlm.image import Tiles, split_image
from smolvlm.training.glyphs import BLANK, CHARACTERS, OTHER, SLOTS, glyph_targets, image_token_of

NAN = [float("nan")] * 4


def box(x: float, y: float) -> list[float]:
    """A box of 4 pixels around a middle."""
    return [x - 2, y - 2, x + 2, y + 2]


def class_of(character: str) -> int:
    return CHARACTERS.index(character) + 2


def tiles_of(size: tuple[int, int], config: ModelConfig) -> Tiles:
    return split_image(Image.new("RGB", size, "white"), config.image)


@pytest.fixture
def single(fresh: Path) -> ModelConfig:
    """A tile of 64 pixels: 8 × 8 patches of 8 pixels, 4 × 4 image tokens."""
    return ModelConfig.from_pretrained(fresh)


@pytest.fixture
def split(fresh_split: Path) -> ModelConfig:
    return ModelConfig.from_pretrained(fresh_split)


def filled(targets: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """(tile, patch) → its classes, for the patches that hold something."""
    places = {(int(tile), int(patch)) for tile, patch, _ in np.argwhere(targets != BLANK)}
    return {place: [int(each) for each in targets[place] if each != BLANK] for place in places}


def test_a_character_is_in_the_patch_of_its_middle(single: ModelConfig) -> None:
    boxes = np.array([box(4, 4), NAN, box(20, 4), box(60, 60)], np.float32)
    targets = glyph_targets("a\nbZ", boxes, (64, 64), tiles_of((64, 64), single), single)
    assert targets.shape == (1, 64, SLOTS)
    assert filled(targets) == {(0, 0): [class_of("a")], (0, 2): [class_of("b")], (0, 63): [class_of("Z")]}


def test_a_space_is_in_the_patch_where_the_letter_before_it_ends(single: ModelConfig) -> None:
    boxes = np.array([NAN, box(4, 4), NAN, box(31, 4), NAN, NAN, box(60, 60), NAN], np.float32)
    targets = glyph_targets(" a b  Z ", boxes, (64, 64), tiles_of((64, 64), single), single)
    space = class_of(" ")  # the first follows no letter and the second of two only a space: they are nowhere
    assert filled(targets) == {
        (0, 0): [class_of("a"), space],
        (0, 3): [class_of("b")],
        (0, 4): [space],
        (0, 63): [class_of("Z"), space],
    }


def test_boxes_are_in_pixels_of_the_image_not_of_the_tile(single: ModelConfig) -> None:
    boxes = np.array([[0, 0, 400, 200]], np.float32)  # the middle of the first quarter of 800 × 400
    targets = glyph_targets("x", boxes, (800, 400), tiles_of((800, 400), single), single)
    assert filled(targets) == {(0, 2 * 8 + 2): [class_of("x")]}  # the tile is square: x 200/800, y 100/400


def test_several_characters_share_a_patch_in_the_order_of_the_text(single: ModelConfig) -> None:
    text = "abcdef漢"
    boxes = np.array([box(4, 4)] * 6 + [box(12, 4)], np.float32)
    targets = glyph_targets(text, boxes, (64, 64), tiles_of((64, 64), single), single)
    assert filled(targets) == {(0, 0): [class_of(each) for each in text[:SLOTS]], (0, 1): [OTHER]}


def test_a_middle_on_the_border_stays_inside(single: ModelConfig) -> None:
    boxes = np.array([[60, 60, 68, 68], [-8, -8, -2, -2]], np.float32)
    targets = glyph_targets("ab", boxes, (64, 64), tiles_of((64, 64), single), single)
    assert filled(targets) == {(0, 63): [class_of("a")], (0, 0): [class_of("b")]}


def test_a_split_image_shows_a_character_twice(split: ModelConfig) -> None:
    tiles = tiles_of((128, 64), split)
    assert (tiles.rows, tiles.cols, len(tiles.pixels)) == (1, 2, 3)
    boxes = np.array([box(4, 4), box(68, 28)], np.float32)
    targets = glyph_targets("ab", boxes, (128, 64), tiles, split)
    assert filled(targets) == {
        (0, 0): [class_of("a")],
        (1, 3 * 8): [class_of("b")],  # 4 pixels into the second crop
        (2, 0): [class_of("a")],
        (2, 3 * 8 + 4): [class_of("b")],  # the global tile is half as wide: 68 / 2 = 34
    }


def test_image_tokens_cover_blocks_of_patches(single: ModelConfig) -> None:
    boxes = np.array([box(4, 4), box(12, 12), NAN, box(20, 4), box(60, 60), NAN], np.float32)
    tokens = image_token_of(boxes, (64, 64), tiles_of((64, 64), single), single)
    # The space between is shown where the next character is; nothing follows the last.
    assert tokens.tolist() == [0, 0, 1, 1, 15, -1]


def test_image_tokens_of_a_split_image_are_those_of_its_crops(split: ModelConfig) -> None:
    boxes = np.array([box(4, 4), box(68, 28)], np.float32)
    tokens = image_token_of(boxes, (128, 64), tiles_of((128, 64), split), split)
    assert tokens.tolist() == [0, 16 + 4]  # 16 tokens a tile, rows of 4; row 3 of the patches is row 1 of the tokens
