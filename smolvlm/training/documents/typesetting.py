"""Chooses the shape of a page and its type, and fits text, type and page to each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log
from random import Random

from smolvlm.training.documents.content import Space, write
from smolvlm.training.documents.fonts import Rectangle, Style, face
from smolvlm.training.documents.geometry import Warp
from smolvlm.training.documents.layout import OVERHANG, Page, Type, overflow, place
from smolvlm.training.documents.options import DocumentOptions
from smolvlm.training.documents.writer import Writer

ASPECTS = {"word": (1.0, 2.0), "line": (1.0, 2.0), "sign": (0.8, 2.0), "receipt": (0.5, 1.0), "dense": (0.6, 1.6)}
ANY_ASPECT = (0.6, 1.7)  # width by height
COLUMNS = {"paragraph": 14, "receipt": 20, "form": 22, "table": 20, "screenshot": 20}  # fewer would say nothing
STEP = 0.5  # font sizes in pixels are multiples of it, so that fonts are opened once


def choose_page_size(random: Random, kind: str, options: DocumentOptions) -> tuple[int, int]:
    """Draw (width, height) in pixels, at most twice as wide as high or as high as wide."""
    edge = random.randint(*options.longest_edge)
    narrow, wide = (log(aspect) for aspect in ASPECTS.get(kind, ANY_ASPECT))
    aspect = exp(random.uniform(narrow, wide))
    return (edge, ceil(edge / aspect)) if aspect > 1 else (ceil(edge * aspect), edge)


@dataclass(frozen=True)
class Setting:
    """What is drawn once for a document's type: styles, sizes in pixels, the size of headings in font sizes as letter
    spacing is, margins."""

    body: Style
    heading: Style
    smallest: float
    wanted: float
    title: float
    spacing: float
    leading: float
    margin: float
    slack: tuple[float, float]

    def type(self, pixels: float) -> Type:
        size, larger = (max(int(pixels * share / STEP), 1) * STEP for share in (1.0, self.title))
        return Type(face(self.body.path, size), face(self.heading.path, larger), self.spacing * size, self.leading)


def choose_setting(
    random: Random, kind: str, named: tuple[Style, ...], size: tuple[int, int], is_small: bool, options: DocumentOptions
) -> Setting:
    """Draw the type of a document on a page of the size; `is_small` keeps it near the options' smallest."""
    scale = max(size) / options.reference_edge
    smallest, largest = (bound * scale for bound in options.text_px)
    if is_small or kind == "dense":
        largest = min(largest, smallest * (1.2 if is_small else 1.8))
    return Setting(
        *_two_styles(random, named),
        smallest=smallest,
        wanted=exp(random.uniform(log(smallest), log(largest))),
        title=random.choice((1.0, 1.0, random.uniform(1.1, 1.5))),
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


def typeset(
    writer: Writer, kind: str, setting: Setting, size: tuple[int, int], warp: Warp | None, options: DocumentOptions
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
            area = _area(size, warp, setting.margin, pixels)
            return place(content, text_type, area, setting.slack), text_type.body.size
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
