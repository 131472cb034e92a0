import numpy as np
import pytest
from PIL import Image

from smolvlm.training.documents.geometry import Warp

STILL = np.zeros((4, 2))


def test_a_quarter_turn_goes_clockwise() -> None:
    warp = Warp.of((100, 100), 90.0, STILL)
    np.testing.assert_allclose(warp.points(np.array([[0.0, 0.0], [100.0, 0.0]])), [[100, 0], [100, 100]], atol=1e-6)


def test_corners_go_where_they_are_moved() -> None:
    shifts = np.array([[3.0, 4.0], [-5.0, 6.0], [-7.0, -8.0], [9.0, -2.0]])
    expected = np.array([[0, 0], [200, 0], [200, 100], [0, 100]]) + shifts
    np.testing.assert_allclose(Warp.of((200, 100), 0.0, shifts).outline(), expected, atol=1e-6)


def test_a_box_becomes_the_hull_of_its_corners_and_nan_stays() -> None:
    boxes = np.array([[40, 40, 60, 60], [np.nan] * 4], np.float32)
    hulls = Warp.of((100, 100), 45.0, STILL).boxes(boxes)
    half = 10 * 2**0.5
    np.testing.assert_allclose(hulls[0], [50 - half, 50 - half, 50 + half, 50 + half], rtol=1e-5)
    assert hulls.dtype == np.float32
    assert np.isnan(hulls[1]).all()


@pytest.mark.parametrize("degrees", [-7.0, 0.0, 4.0])
def test_the_picture_moves_with_its_points(degrees: float) -> None:
    warp = Warp.of((160, 120), degrees, np.array([[4.0, 2.0], [-3.0, 1.0], [-2.0, -4.0], [5.0, -3.0]]))
    page = Image.new("L", (160, 120))
    page.paste(255, (100, 30, 110, 40))
    seen = np.argwhere(np.asarray(warp.image(page)) > 127)
    middle = warp.points(np.array([105.0, 35.0]))
    np.testing.assert_allclose(seen.mean(axis=0)[::-1] + 0.5, middle, atol=0.5)


def test_areas_are_held_with_their_margin() -> None:
    warp = Warp.of((100, 100), 0.0, STILL)
    assert warp.holds((10, 10, 90, 90), 10)
    assert not warp.holds((9, 10, 90, 90), 10)
    assert not Warp.of((100, 100), 45.0, STILL).holds((10, 10, 90, 90), 0)
