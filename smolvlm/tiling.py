"""How large an image is made and into how many tiles it is cut: the arithmetic of splitting, without a pixel.

Sizes are (width, height) in pixels, grids (rows, cols); a grid of (0, 0) is an image that is not split, one tile. A
split image makes rows * cols tiles and the global one.
"""

import math
from functools import lru_cache

MAX_EDGE = 4096  # transformers caps the first resize here (MAX_IMAGE_SIZE of image_processing_idefics3)


def first_size(width: int, height: int, longest_edge: int, upscale: bool) -> tuple[int, int]:
    """`get_resize_output_image_size` of transformers: longest edge to the target, the other edge even, both capped.

    Without `upscale` an image whose longest edge is not above the target stays as it is.
    """
    if not upscale and max(width, height) <= longest_edge:
        return _capped(width, height)
    aspect = width / height
    if width >= height:
        return _capped(longest_edge, max(_even(int(longest_edge / aspect)), 1))
    return _capped(max(_even(int(longest_edge * aspect)), 1), longest_edge)


def whole_tiles(width: int, height: int, side: int) -> tuple[int, int]:
    """`resize_for_vision_encoder` of transformers: both edges up to whole tiles, the longer one first."""
    aspect = width / height
    if width >= height:
        width = _round_up(width, side)
        return width, _round_up(int(width / aspect), side)
    height = _round_up(height, side)
    return _round_up(int(height * aspect), side), height


def grid(width: int, height: int, side: int, longest_edge: int, upscale: bool) -> tuple[int, int]:
    """The tiles that an image of this size is cut into, where the checkpoint splits at all."""
    wide, high = whole_tiles(*first_size(width, height, longest_edge, upscale), side)
    return (0, 0) if (wide, high) == (side, side) else (high // side, wide // side)


def num_tiles(rows: int, cols: int) -> int:
    """Tiles that the model sees of an image, the global one included."""
    return rows * cols + 1


@lru_cache(maxsize=1024)
def largest_edge(width: int, height: int, side: int, longest_edge: int, upscale: bool, max_tiles: int) -> int:
    """The largest longest edge, up to `longest_edge`, at which an image makes at most `max_tiles` tiles.

    There is always one, since an edge of one tile splits nothing.
    """
    assert max_tiles >= 1, "the whole image is a tile of its own"
    edges = range(longest_edge, side, -1)
    fitting = (edge for edge in edges if num_tiles(*grid(width, height, side, edge, upscale)) <= max_tiles)
    return next(fitting, min(side, longest_edge))


def _capped(width: int, height: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        return MAX_EDGE, max(int(MAX_EDGE / aspect), 1)
    if height > width and height > MAX_EDGE:
        return max(int(MAX_EDGE * aspect), 1), MAX_EDGE
    return width, height


def _even(edge: int) -> int:
    return edge + edge % 2


def _round_up(edge: int, side: int) -> int:
    return math.ceil(edge / side) * side
