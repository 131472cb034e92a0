"""The generator: a document for every index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smolvlm.training.documents.appearance import Look, choose_flaws, choose_look, choose_warp
from smolvlm.training.documents.drawing import draw
from smolvlm.training.documents.fonts import relatives, styles
from smolvlm.training.documents.geometry import Warp
from smolvlm.training.documents.layout import Page
from smolvlm.training.documents.options import DocumentOptions, Split
from smolvlm.training.documents.typesetting import choose_page_size, choose_setting, typeset
from smolvlm.training.documents.writer import Writer


@dataclass(frozen=True)
class Document:
    """A picture of text and what it says.

    image: RGB.
    text: a line for every visual line, from top to bottom; words and cells from left to right with one space between.
    boxes: float32 [len(text), 4], the ink (x0, y0, x1, y1) of every character in pixels of the image, the axis-aligned
        hull where the page is turned; NaN for spaces and line ends.
    kind: one of `KINDS`. degraded: whether it was made hard to read. font: the family's name.
    """

    image: Image.Image
    text: str
    boxes: NDArray[np.float32]
    kind: str
    degraded: bool
    font: str


@dataclass(frozen=True)
class Draft:
    """All that is decided of a document before its pixels.

    size: (width, height); it and font_size in pixels. warp: None where the page is seen straight. seed: of the grain.
    """

    kind: str
    degraded: bool
    font: str
    size: tuple[int, int]
    page: Page
    font_size: float
    look: Look
    warp: Warp | None
    seed: int


@dataclass(frozen=True)
class DocumentGenerator:
    """Draws documents; a document is a function of the split, the seed, the options, the index and the installed fonts.

    No font family, no word of four or more letters and no number or code of four or more characters is in both splits.

    Raises:
        ValueError: the split is unknown or the seed negative.
    """

    split: Split
    seed: int
    options: DocumentOptions = field(default_factory=DocumentOptions)

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split is {self.split!r}; it must be one of {', '.join(get_args(Split))}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")

    def document(self, index: int) -> Document:
        """Draw the document of the index, 0 or above.

        Raises:
            ValueError: the index is negative.
        """
        draft = self.draft(index)
        page, warp = draft.page, draft.warp
        image = draw(page, draft.size, draft.font_size, draft.look, warp, Random(draft.seed))
        boxes = warp.boxes(page.boxes) if warp else page.boxes
        return Document(image, page.text, boxes, draft.kind, draft.degraded, draft.font)

    def draft(self, index: int) -> Draft:
        """Write and set the document of the index, and choose how it looks, without drawing it.

        Raises:
            ValueError: the index is negative.
        """
        if index < 0:
            raise ValueError(f"index is {index}; it must be at least 0")
        random = Random(_digest(f"{self.split} {self.seed} {index}"))
        kind = random.choices(list(self.options.kinds), list(self.options.kinds.values()))[0]
        flaws = choose_flaws(random, self.options.degraded_share)
        size = choose_page_size(random, kind, self.options)
        warp = choose_warp(random, flaws, kind, size)
        font = random.choice(random.choice(relatives(self.split)))
        setting = choose_setting(random, kind, styles(self.split)[font], size, "small" in flaws, self.options)
        page, font_size = typeset(Writer(random, self.split), kind, setting, size, warp, self.options)
        look = choose_look(random, flaws, kind)
        return Draft(kind, bool(flaws), font, size, page, font_size, look, warp, random.getrandbits(64))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
