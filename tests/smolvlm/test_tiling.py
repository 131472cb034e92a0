import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, split_image
from smolvlm.tiling import grid, largest_edge, num_tiles

SIDE, LONGEST = 512, 2048  # of the 256M checkpoint
TINY = ImageConfig(tile_size=32, longest_edge=128, do_image_splitting=True, mean=(0, 0, 0), std=(1, 1, 1))
edges = st.integers(1, 5000)


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (200, 150), (90, 90), (33, 32), (32, 32), (300, 20), (20, 300), (64, 129)])
def test_the_grid_is_the_one_that_splitting_makes(size: tuple[int, int], upscale: bool) -> None:
    tiles = split_image(Image.new("RGB", size), TINY, ImagePolicy(upscale=upscale))
    assert grid(*size, TINY.tile_size, TINY.longest_edge, upscale) == (tiles.rows, tiles.cols)
    assert num_tiles(tiles.rows, tiles.cols) == len(tiles.pixels)


@pytest.mark.parametrize(
    ("size", "max_tiles", "expected"),
    [
        ((1600, 1200), 13, (3, 4)),  # uncapped
        ((1600, 1200), 12, (3, 3)),
        ((1600, 1200), 7, (2, 2)),
        ((1600, 1200), 5, (2, 2)),
        ((1600, 1200), 4, (0, 0)),
        ((1600, 1200), 1, (0, 0)),
        ((3000, 600), 5, (1, 4)),
        ((3000, 600), 4, (1, 3)),
        ((600, 3000), 4, (3, 1)),
    ],
)
def test_a_cap_gives_the_largest_image_that_keeps_it(
    size: tuple[int, int], max_tiles: int, expected: tuple[int, int]
) -> None:
    edge = largest_edge(*size, SIDE, LONGEST, True, max_tiles)
    assert grid(*size, SIDE, edge, True) == expected
    if edge < LONGEST:
        assert num_tiles(*grid(*size, SIDE, edge + 1, True)) > max_tiles


@settings(deadline=None)
@given(edges, edges, st.booleans(), st.integers(1, 30))
def test_no_image_ever_makes_more_tiles_than_the_cap(width: int, height: int, upscale: bool, max_tiles: int) -> None:
    edge = largest_edge(width, height, SIDE, LONGEST, upscale, max_tiles)
    assert num_tiles(*grid(width, height, SIDE, edge, upscale)) <= max_tiles


def test_a_policy_caps_each_image_by_its_own_shape() -> None:
    policy = ImagePolicy(max_tiles=5)
    for size, shape in {(200, 150): (5, 2, 2), (150, 30): (5, 1, 4), (20, 20): (5, 2, 2)}.items():
        tiles = split_image(Image.new("RGB", size, "teal"), TINY, policy)
        assert (len(tiles.pixels), tiles.rows, tiles.cols) == shape
        assert np.unique(tiles.pixels.reshape(-1, 3), axis=0).tolist() == [[0, 128, 128]]
    assert len(split_image(Image.new("RGB", (200, 150)), TINY, ImagePolicy(max_tiles=1)).pixels) == 1
    assert len(split_image(Image.new("RGB", (20, 20)), TINY, ImagePolicy(max_tiles=5, upscale=False)).pixels) == 1


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tiles 0 must be at least 1"):
        ImagePolicy(max_tiles=0)
