"""Places rows of text on a page: where every word is drawn, and the box of every character."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from smolvlm.training.documents.content import Cell, Content, Row
from smolvlm.training.documents.fonts import Face, Rectangle

NOWHERE = (float("nan"),) * 4
OVERHANG = 0.25  # of the size: how far the ink of an italic or accented glyph may leave its advance


@dataclass(frozen=True)
class Type:
    """How text is set: the faces, letter spacing in pixels, the pitch of rows in line heights."""

    body: Face
    heading: Face
    tracking: float
    leading: float

    @property
    def pitch(self) -> float:
        return self._height(self.body)

    def face(self, row: Row) -> Face:
        return self.heading if row.is_heading else self.body

    def height(self, row: Row) -> float:
        """The pixels that a row takes up, the gap above it left out."""
        return self._height(self.face(row))

    def _height(self, face: Face) -> float:
        return (face.ascent + face.descent) * self.leading

    def bottoms(self, rows: tuple[Row, ...]) -> list[float]:
        """Where each row ends, in pixels from the top of the first."""
        return list(accumulate(self.height(row) + row.gap * self.pitch for row in rows))

    def width(self, text: str, face: Face) -> float:
        return face.length(text) + self.tracking * len(text)


@dataclass(frozen=True)
class Run:
    """Text drawn in one call: a word, or a letter where letters are spaced out; the origin is on the baseline."""

    text: str
    x: float
    y: float
    face: Face


@dataclass(frozen=True)
class Page:
    """A page as it is to be drawn, in pixels: runs of text, the boxes float32 [len(text), 4] of the characters (NaN for
    white space), the bands behind headings, the lines around the text."""

    text: str
    runs: tuple[Run, ...]
    boxes: NDArray[np.float32]
    bands: tuple[Rectangle, ...]
    lines: tuple[Rectangle, ...]


def overflow(content: Content, kind: Type, area: Rectangle) -> float:
    """Return how many times too large the type is for the area; at most 1 if all fits."""
    width, height = area[2] - area[0], area[3] - area[1]
    needed = kind.bottoms(content.rows)[-1] / height
    for row in content.rows:
        for cell in row.cells:
            room = (cell.end - cell.start) * width - _gap(kind, row)
            needed = max(needed, kind.width(cell.text, kind.face(row)) / room if room > 0 else float("inf"))
    return needed


def _gap(kind: Type, row: Row) -> float:
    return 0.6 * kind.body.size if len(row.cells) > 1 else 0.0


def place(content: Content, kind: Type, area: Rectangle, slack: tuple[float, float]) -> Page:
    """Set the rows into the area (x0, y0, x1, y1), which has to hold them; `slack` says where the block of text stands
    in the room that is left over, from (0, 0), the upper left corner, to (1, 1)."""
    area = _block(content, kind, area, slack)
    runs: list[Run] = []
    boxes: list[Rectangle] = []
    for row, bottom in zip(content.rows, kind.bottoms(content.rows), strict=True):
        baseline = area[1] + bottom - kind.face(row).descent - kind.height(row) * (1 - 1 / kind.leading) / 2
        for cell in row.cells:
            boxes += [NOWHERE] * bool(boxes)
            stretch = _stretch(cell, kind, row, area)
            placed = list(_words(cell, kind, kind.face(row), (_left(cell, kind, row, area), baseline), stretch))
            runs += [run for word, _ in placed for run in word]
            boxes += [box for _, word in placed for box in word][:-1]
    text = "\n".join(row.text for row in content.rows)
    return Page(
        text, tuple(runs), np.array(boxes, np.float32), _bands(content, kind, area), _lines(content, kind, area)
    )


def _block(content: Content, kind: Type, area: Rectangle, slack: tuple[float, float]) -> Rectangle:
    """Shrink the area to the height of the text and, where rows are not split into cells, to its width."""
    x0, y0, x1, y1 = area
    height = kind.bottoms(content.rows)[-1]
    y0 += (y1 - y0 - height) * slack[1]
    if all(len(row.cells) == 1 for row in content.rows):
        widest = max(kind.width(row.text, kind.face(row)) for row in content.rows)
        x0 += (x1 - x0 - widest) * slack[0]
        x1 = x0 + widest
    return x0, y0, x1, y0 + height


def _left(cell: Cell, kind: Type, row: Row, area: Rectangle) -> float:
    start, end = (area[0] + (area[2] - area[0]) * share for share in (cell.start, cell.end))
    start += _gap(kind, row) / 2 * (cell.start > 0)
    end -= _gap(kind, row) / 2 * (cell.end < 1)
    width = kind.width(cell.text, kind.face(row))
    if cell.align == "center":
        return (start + end - width) / 2
    return end - width if cell.align == "right" else start


def _stretch(cell: Cell, kind: Type, row: Row, area: Rectangle) -> float:
    """Return by how much every space of a justified line is wider; lines of few words are left as they are."""
    spare = (area[2] - area[0]) * (cell.end - cell.start) - kind.width(cell.text, kind.face(row))
    stretch = spare / max(cell.text.count(" "), 1)
    return stretch if cell.align == "both" and stretch < kind.body.size else 0.0


def _words(
    cell: Cell, kind: Type, face: Face, origin: tuple[float, float], stretch: float
) -> Iterator[tuple[list[Run], list[Rectangle]]]:
    """Yield the runs of each word and the boxes of its letters and of the space after it."""
    x, y = origin
    space = face.length(" ") + kind.tracking + stretch
    for word in cell.text.split(" "):
        glyphs = [face.glyph(letter) for letter in word]
        drawn = face.length(word)
        kerning = drawn / max(sum(advance for advance, _ in glyphs), 1e-6)
        runs, boxes, at = [], [], x
        for letter, (advance, (left, top, right, bottom)) in zip(word, glyphs, strict=True):
            boxes.append((at + left, y + top, at + right, y + bottom))
            runs += [Run(letter, at, y, face)] if kind.tracking else []
            at += advance * kerning + kind.tracking
        yield runs or [Run(word, x, y, face)], [*boxes, NOWHERE]
        x += drawn + kind.tracking * len(word) + space


def _bands(content: Content, kind: Type, area: Rectangle) -> tuple[Rectangle, ...]:
    if content.rules not in ("grid", "frame"):
        return ()
    ends = zip(content.rows, kind.bottoms(content.rows), strict=True)
    bands = [(area[1] + end - kind.height(row), area[1] + end) for row, end in ends if row.is_heading]
    pad = kind.body.size * OVERHANG
    return tuple((area[0] - pad, top, area[2] + pad, bottom) for top, bottom in bands)


def _lines(content: Content, kind: Type, area: Rectangle) -> tuple[Rectangle, ...]:
    x0, y0, x1, y1 = area
    if content.rules == "none":
        return ()
    ends = list(_rule_heights(content, kind, y0))
    if content.rules == "dashes":
        step = kind.body.size / 2
        return tuple((x, y, x + step / 2, y) for y in ends for x in np.arange(x0, x1 - step / 2, step).tolist())
    under = [(x0, y, x1, y) for y in ends]
    pad = kind.body.size * OVERHANG
    frame = [
        (x0 - pad, y0, x1 + pad, y0),
        (x0 - pad, y1, x1 + pad, y1),
        (x0 - pad, y0, x0 - pad, y1),
        (x1 + pad, y0, x1 + pad, y1),
    ]
    if content.rules == "frame":
        return tuple(frame)
    if content.rules == "lines":
        return tuple(under)
    starts = {cell.start for row in content.rows for cell in row.cells if cell.start > 0}
    return (*under, *frame, *((x0 + (x1 - x0) * s, y0, x0 + (x1 - x0) * s, y1) for s in sorted(starts)))


def _rule_heights(content: Content, kind: Type, top: float) -> Iterator[float]:
    """Yield where the rule under a row is drawn: in the middle of the gap below it."""
    rows = content.rows
    for row, below, bottom in zip(rows, (*rows[1:], None), kind.bottoms(rows), strict=True):
        if row.has_rule:
            yield top + bottom + (below.gap * kind.pitch / 2 if below else 0.0)
