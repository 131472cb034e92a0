"""The generator: a document for every index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import exp, log
from random import Random
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smolvlm.training.documents.appearance import choose_flaws, choose_look, choose_warp
from smolvlm.training.documents.content import Space, write
from smolvlm.training.documents.drawing import draw
from smolvlm.training.documents.fonts import Rectangle, Style, face, relatives, styles
from smolvlm.training.documents.geometry import Warp
from smolvlm.training.documents.layout import OVERHANG, Page, Type, overflow, place
from smolvlm.training.documents.options import DocumentOptions, Split
from smolvlm.training.documents.writer import Writer

ASPECTS = {"word": (1.0, 2.0), "line": (1.0, 2.0), "sign": (0.8, 2.0), "receipt": (0.5, 1.0), "dense": (0.6, 1.6)}
ANY_ASPECT = (0.6, 1.7)  # width by height
COLUMNS = {"paragraph": 14, "receipt": 20, "form": 22, "table": 20, "screenshot": 20}  # fewer would say nothing
STEP = 0.5  # font sizes in pixels are multiples of it, so that fonts are opened once


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
        if index < 0:
            raise ValueError(f"index is {index}; it must be at least 0")
        random = Random(_digest(f"{self.split} {self.seed} {index}"))
        kinds = self.options.kinds
        kind = random.choices(list(kinds), list(kinds.values()))[0]
        flaws = choose_flaws(random, self.options.degraded_share)
        size = _page_size(random, kind, self.options)
        warp = choose_warp(random, flaws, kind, size)
        family = random.choice(random.choice(relatives(self.split)))
        setting = _choose_setting(random, kind, styles(self.split)[family], size, "small" in flaws, self.options)
        page, pixels = _typeset(Writer(random, self.split), kind, setting, size, warp, self.options)
        image = draw(page, size, pixels, choose_look(random, flaws, kind), warp, random)
        boxes = warp.boxes(page.boxes) if warp else page.boxes
        return Document(image, page.text, boxes, kind, bool(flaws), family)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _page_size(random: Random, kind: str, options: DocumentOptions) -> tuple[int, int]:
    edge = random.randint(*options.longest_edge)
    narrow, wide = (log(aspect) for aspect in ASPECTS.get(kind, ANY_ASPECT))
    aspect = exp(random.uniform(narrow, wide))
    return (edge, max(round(edge / aspect), edge // 2)) if aspect > 1 else (max(round(edge * aspect), edge // 2), edge)


@dataclass(frozen=True)
class _Setting:
    """What is drawn once for a document's type: styles, sizes in pixels, letter spacing in font sizes, margins."""

    body: Style
    heading: Style
    smallest: float
    wanted: float
    spacing: float
    leading: float
    margin: float
    slack: tuple[float, float]

    def type(self, pixels: float) -> Type:
        size = max(int(pixels / STEP), 1) * STEP
        return Type(face(self.body.path, size), face(self.heading.path, size), self.spacing * size, self.leading)


def _choose_setting(
    random: Random, kind: str, named: tuple[Style, ...], size: tuple[int, int], is_small: bool, options: DocumentOptions
) -> _Setting:
    scale = max(size) / options.reference_edge
    smallest, largest = (bound * scale for bound in options.text_px)
    if is_small or kind == "dense":
        largest = min(largest, smallest * (1.2 if is_small else 1.8))
    return _Setting(
        *_two_styles(random, named),
        smallest=smallest,
        wanted=exp(random.uniform(log(smallest), log(largest))),
        spacing=random.choice((0.0, 0.0, 0.0, random.uniform(0.01, 0.1))),
        leading=random.uniform(1.02, 1.4),
        margin=0.0 if kind == "dense" else random.uniform(0, 0.06) * max(size),
        slack=(random.random(), random.random()),
    )


def _two_styles(random: Random, named: tuple[Style, ...]) -> tuple[Style, Style]:
    """Draw the style of the text, mostly a plain one, and of its headings, bold where there is one."""
    plain = [style for style in named if style.is_plain] or list(named)
    body = random.choice(plain if random.random() < 0.6 else named)
    bold = [style for style in named if style.name.lower() == "bold"] or [body]
    return body, random.choice((body, bold[0]))


def _typeset(
    writer: Writer, kind: str, setting: _Setting, size: tuple[int, int], warp: Warp | None, options: DocumentOptions
) -> tuple[Page, float]:
    """Write and set a document as large as wanted, or smaller where that does not fit, or with less text where the
    smallest type does not; return the page and its font size in pixels."""
    pixels, room = setting.wanted, 1.0
    while True:
        text_type = setting.type(pixels)
        content = write(kind, writer, _space(kind, text_type, _area(size, warp, setting.margin, pixels), room, options))
        while (excess := overflow(content, text_type, _area(size, warp, setting.margin, pixels))) > 1:
            pixels /= min(excess, 2.0)
            if pixels < setting.smallest:
                break
            text_type = setting.type(pixels)
        else:
            return place(
                content, text_type, _area(size, warp, setting.margin, pixels), setting.slack
            ), text_type.body.size
        pixels, room = setting.smallest + STEP, room * 0.85


def _space(kind: str, text_type: Type, area: Rectangle, room: float, options: DocumentOptions) -> Space:
    columns = int(room * (area[2] - area[0]) / text_type.width("n", text_type.body))
    rows = int(room * (area[3] - area[1]) / text_type.pitch)
    columns = max(columns, COLUMNS.get(kind, 1) if room == 1.0 else 1)
    return Space(columns, min(max(rows, 1), options.max_lines), options.max_chars)


def _area(size: tuple[int, int], warp: Warp | None, margin: float, pixels: float) -> Rectangle:
    """Return the largest area, around the middle of the page, whose text stays within the image."""
    width, height = size
    margin += 2 * OVERHANG * pixels
    area = (margin, margin, width - margin, height - margin)
    while warp and not warp.holds(area, OVERHANG * pixels):
        area = _shrunk(area)
    return area


def _shrunk(area: Rectangle) -> Rectangle:
    across, down = 0.015 * (area[2] - area[0]), 0.015 * (area[3] - area[1])
    return area[0] + across, area[1] + down, area[2] - across, area[3] - down
