"""Sets of row numbers as sorted, disjoint, half-open ranges: a finished million rows is two integers."""

import numpy as np
import numpy.typing as npt

Ranges = npt.NDArray[np.int64]  # [n, 2]: start, stop


def empty() -> Ranges:
    """Return the empty set."""
    return np.empty((0, 2), dtype=np.int64)


def of_rows(rows: npt.ArrayLike) -> Ranges:
    """Return the set of single row numbers, in any order, repeats allowed."""
    ordered = np.unique(np.asarray(rows, dtype=np.int64))
    if not len(ordered):
        return empty()
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    starts = ordered[np.r_[0, breaks + 1]]
    stops = ordered[np.r_[breaks, len(ordered) - 1]] + 1
    return np.stack([starts, stops], axis=1)


def union(*sets: Ranges) -> Ranges:
    """Return the rows that are in any of the sets."""
    parts = np.concatenate([empty(), *sets])
    if not len(parts):
        return empty()
    parts = parts[np.argsort(parts[:, 0], kind="stable")]
    reach = np.maximum.accumulate(parts[:, 1])
    first = np.r_[True, parts[1:, 0] > reach[:-1]]
    starts = parts[first, 0]
    last = np.r_[np.flatnonzero(first)[1:] - 1, len(parts) - 1]
    return np.stack([starts, reach[last]], axis=1)


def complement(done: Ranges, total: int) -> Ranges:
    """Return the rows of `[0, total)` that are not in `done`, itself a union."""
    edges = np.concatenate([[0], done.reshape(-1), [total]]).reshape(-1, 2)
    return edges[edges[:, 0] < edges[:, 1]]


def intersection(a: Ranges, b: Ranges) -> Ranges:
    """Return the rows that are in both unions."""
    top = int(max(a[-1, 1] if len(a) else 0, b[-1, 1] if len(b) else 0))
    return complement(union(complement(a, top), complement(b, top)), top)


def count(ranges: Ranges) -> int:
    """Return how many rows a union holds."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def split(ranges: Ranges, max_rows: int) -> list[Ranges]:
    """Cut a union, in order, into unions of `max_rows` rows each; the last may be smaller."""
    pieces: list[Ranges] = []
    current: list[tuple[int, int]] = []
    room = max_rows
    for start, stop in ranges.tolist():
        while start < stop:
            end = min(stop, start + room)
            current.append((start, end))
            room -= end - start
            start = end
            if room == 0:
                pieces.append(np.array(current, dtype=np.int64))
                current, room = [], max_rows
    return [*pieces, np.array(current, dtype=np.int64)] if current else pieces
