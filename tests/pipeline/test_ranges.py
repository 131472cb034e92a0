"""Range sets against Python's own sets."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ranges
from pipeline.ranges import Ranges

Rows = st.sets(st.integers(0, 60), max_size=40)


def rows_of(found: Ranges) -> set[int]:
    return {row for start, stop in found.tolist() for row in range(start, stop)}


def assert_canonical(found: Ranges) -> None:
    """Sorted, none empty, none that touch: one set has one form."""
    assert found.dtype == np.int64
    assert found.shape == (len(found), 2)
    assert all(start < stop for start, stop in found.tolist())
    assert all(left[1] < right[0] for left, right in pairwise(found.tolist()))


@settings(deadline=None)
@given(st.lists(st.integers(0, 60)))
def test_of_rows_takes_any_order_and_repeats(rows: list[int]) -> None:
    found = ranges.of_rows(rows)
    assert_canonical(found)
    assert rows_of(found) == set(rows)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=12))
def test_union_merges_unsorted_nested_and_touching_ranges(spans: list[tuple[int, int]]) -> None:
    parts = [np.array([[start, start + length]], np.int64) for start, length in spans]
    found = ranges.union(*parts)
    assert_canonical(found)
    assert rows_of(found) == {row for start, length in spans for row in range(start, start + length)}


@settings(deadline=None)
@given(Rows, Rows)
def test_intersection_and_count(a: set[int], b: set[int]) -> None:
    found = ranges.intersection(ranges.of_rows(sorted(a)), ranges.of_rows(sorted(b)))
    assert_canonical(found)
    assert rows_of(found) == a & b
    assert ranges.count(found) == len(a & b)


@settings(deadline=None)
@given(Rows, st.integers(61, 80))
def test_complement_is_the_rest(done: set[int], total: int) -> None:
    found = ranges.complement(ranges.of_rows(sorted(done)), total)
    assert_canonical(found)
    assert rows_of(found) == set(range(total)) - done


@settings(deadline=None)
@given(Rows, st.integers(1, 9))
def test_split_keeps_order_and_fills_every_piece_but_the_last(rows: set[int], size: int) -> None:
    pieces = ranges.split(ranges.of_rows(sorted(rows)), size)
    assert [row for piece in pieces for row in sorted(rows_of(piece))] == sorted(rows)
    assert all(ranges.count(piece) == size for piece in pieces[:-1])
    assert all(0 < ranges.count(piece) <= size for piece in pieces)


def test_a_finished_billion_rows_is_two_integers() -> None:
    done = ranges.union(*[np.array([[i * 1_000_000, (i + 1) * 1_000_000]], np.int64) for i in range(1000)])
    assert done.tolist() == [[0, 1_000_000_000]]
    assert ranges.complement(done, 1_000_000_001).tolist() == [[1_000_000_000, 1_000_000_001]]
    assert not len(ranges.complement(ranges.empty(), 0))
