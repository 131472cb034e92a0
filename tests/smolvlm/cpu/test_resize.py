"""Byte by byte Pillow's own, on random sizes and pixels of both extremes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from smolvlm.cpu.build import native_library
from smolvlm.cpu.resize import _pillow, lanczos

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 400))
needs_native = pytest.mark.skipif(native_library("resize") is None, reason="no C++ compiler")


@needs_native
@settings(max_examples=250, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from([1, 3]), st.booleans())
@example((1000, 1000), (750, 500), 3, True)  # either side of Pillow's rule for the order of passes
@example((1000, 1000), (751, 500), 3, True)
@example((1000, 500), (875, 250), 3, True)
@example((1000, 500), (876, 250), 3, True)
@example((100, 100), (100, 37), 3, True)
@example((100, 100), (37, 100), 3, True)
def test_it_is_pillows(before: tuple[int, int], after: tuple[int, int], channels: int, extreme: bool) -> None:
    random = np.random.default_rng(before)
    pixels = random.integers(0, 256, (before[1], before[0], channels), dtype=np.uint8)
    if extreme:
        pixels = (pixels > 127).astype(np.uint8) * 255
    resized = lanczos(pixels, after)
    assert resized.shape == (after[1], after[0], channels)
    assert np.array_equal(resized, _pillow(pixels, after, (0, 0, *before)))


@needs_native
@settings(max_examples=150, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.lists(st.floats(0, 1), min_size=4, max_size=4))
@example((60, 40), (60, 40), [0.01, 0, 1, 1])  # the size stays, the pixels move
@example((60, 40), (60, 40), [0, 0, 1, 0.99])
def test_a_box_is_pillows(before: tuple[int, int], after: tuple[int, int], shares: list[float]) -> None:
    pixels = np.random.default_rng(before).integers(0, 256, (before[1], before[0], 3), dtype=np.uint8)
    (left, right), (top, bottom) = (
        [share * side for share in sorted(shares[axis::2])] for axis, side in enumerate(before)
    )
    assume(right - left > 0.01 and bottom - top > 0.01)
    box = (left, top, right, bottom)
    assert np.array_equal(lanczos(pixels, after, box), _pillow(pixels, after, box))


@needs_native
def test_pixels_need_not_lie_in_one_run() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)[::2, ::3]
    assert np.array_equal(lanczos(pixels, (32, 48)), _pillow(pixels, (32, 48), (0, 0, 20, 20)))


def test_decoders_start_without_torch() -> None:
    code = "import sys, smolvlm.image; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
