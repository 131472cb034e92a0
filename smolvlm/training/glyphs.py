"""Dense supervision for reading: which characters lie in each patch, and which image token shows which character.

A character belongs to the patch that holds the middle of its box, in every tile that shows it: in a split image that is
one of the crops and the global tile. A space has no ink: it belongs to the patch where the letter before it ends.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smolvlm.config import ModelConfig
from smolvlm.image import Tiles

SLOTS = 4  # characters told apart in one patch; more than these are left out
CHARACTERS = "".join(map(chr, range(32, 127))) + "£€°§éèüöäñç"
BLANK, OTHER = 0, 1
NUM_CLASSES = len(CHARACTERS) + 2
_CLASS_OF = {character: index + 2 for index, character in enumerate(CHARACTERS)}

Floats = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


def glyph_targets(text: str, boxes: Floats, size: tuple[int, int], tiles: Tiles, config: ModelConfig) -> Int64:
    """Classes int64 [N, P, SLOTS] of the characters in each patch, in the order of the text, then BLANK.

    `boxes` are float32 [len(text), 4] in pixels of an image of `size` (width, height), NaN for white space.
    """
    num_patches = config.vision.num_patches
    targets = np.full((len(tiles.pixels) * num_patches, SLOTS), BLANK, np.int64)
    used = np.zeros(len(targets), np.int64)
    classes = [_CLASS_OF.get(character, OTHER) for character in text]
    for places in _patches(_with_spaces(text, boxes), size, tiles, config):
        for place, glyph in zip(places.tolist(), classes, strict=True):
            if place >= 0 and used[place] < SLOTS:
                targets[place, used[place]] = glyph
                used[place] += 1
    return targets.reshape(-1, num_patches, SLOTS)


def image_token_of(boxes: Floats, size: tuple[int, int], tiles: Tiles, config: ModelConfig) -> Int64:
    """For each character the number of the image token (counted over all tiles) that shows its middle, int64 [len].

    White space is shown where the next character is; -1 where nothing follows.
    """
    patches = _patches(boxes, size, tiles, config)[0]
    grid = config.vision.image_size // config.vision.patch_size
    side = grid // config.scale_factor
    tile, patch = np.divmod(patches, config.vision.num_patches)
    row, col = (index // config.scale_factor for index in np.divmod(patch, grid))
    tokens = np.where(patches >= 0, tile * config.image_seq_len + row * side + col, -1)
    for index in range(len(tokens) - 2, -1, -1):
        if tokens[index] < 0:
            tokens[index] = tokens[index + 1]
    return tokens


def _with_spaces(text: str, boxes: Floats) -> Floats:
    """Give every space after a letter the right edge of that letter for a box."""
    letters = np.array([index for index, character in enumerate(text[1:]) if character == " "], np.int64)
    boxes = boxes.copy()
    boxes[letters + 1] = boxes[letters][:, [2, 1, 2, 3]]
    return boxes


def _patches(boxes: Floats, size: tuple[int, int], tiles: Tiles, config: ModelConfig) -> list[Int64]:
    """The patch (counted over all tiles) of each character's middle, -1 for white space: once in the finest tiles, and
    once more in the global tile of a split image."""
    sums: Floats = (boxes[:, :2] + boxes[:, 2:]) / (2 * np.array(size, np.float32))
    known = np.isfinite(sums[:, 0])
    middles = np.clip(np.nan_to_num(sums), 0.0, 1.0 - 1e-6).astype(np.float32)  # 0..1, (x, y)
    rows, cols = max(tiles.rows, 1), max(tiles.cols, 1)
    crops = _in_grid(middles, known, rows, cols, 0, config)
    return [crops] if tiles.rows == 0 else [crops, _in_grid(middles, known, 1, 1, rows * cols, config)]


def _in_grid(
    middles: Floats, known: npt.NDArray[np.bool_], rows: int, cols: int, first_tile: int, config: ModelConfig
) -> Int64:
    scaled = middles * np.array([cols, rows], np.float32)
    tile = first_tile + scaled[:, 1].astype(np.int64) * cols + scaled[:, 0].astype(np.int64)
    inside = (scaled % 1.0) * config.vision.image_size // config.vision.patch_size
    grid = config.vision.image_size // config.vision.patch_size
    col, row = np.minimum(inside.astype(np.int64), grid - 1).T
    return np.where(known, tile * config.vision.num_patches + row * grid + col, -1)
