"""Native packing against numpy's, of views in every direction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm.cpu import pack as module
from smolvlm.cpu.build import native_library
from smolvlm.cpu.pack import pack

SIDES = st.one_of(st.integers(1, 70), st.integers(1, 200))
STEPS = st.sampled_from([1, -1, 2, -3])


@pytest.mark.skipif(native_library("pack") is None, reason="no C++ compiler")
@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.sampled_from([1, 3]), st.booleans(), STEPS, STEPS)
def test_it_is_the_view_in_dense_memory(
    height: int, width: int, channels: int, swapped: bool, down: int, across: int
) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    view = (pixels.swapaxes(0, 1) if swapped else pixels)[::down, ::across]
    packed = pack(view)
    assert packed.flags.c_contiguous
    assert packed.flags.owndata
    np.testing.assert_array_equal(packed, view)


def test_numpy_does_it_where_there_is_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_native", lambda: None)
    view = np.arange(60, dtype=np.uint8).reshape(4, 5, 3).swapaxes(0, 1)[::-1]
    np.testing.assert_array_equal(pack(view), view)
