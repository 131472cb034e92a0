"""How a document looks: its colours, its paper, and what wears it down."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from smolvlm.training.documents.geometry import Warp

Colour = tuple[int, int, int]
FLAWS = ("small", "blurred", "noisy", "turned", "faint", "coloured")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FLAT = ("screenshot",)  # never photographed
BRIGHTEST, DARKEST = 252.0, 4.0


@dataclass(frozen=True)
class Look:
    """Colours and wear of a document.

    paper, ink, desk: colours of the page, of the text, and of what lies around the page.
    rule, band: how much ink lines and the bands behind headings carry, 0 to 1. stroke: how thick lines are, in font
        sizes.
    shade: amplitude of uneven light in grey levels. blur: standard deviation in font sizes.
    noise: standard deviation in grey levels. quality: of JPEG; None: not compressed.
    """

    paper: Colour
    ink: Colour
    desk: Colour
    rule: float
    stroke: float
    band: float
    shade: float
    blur: float
    noise: float
    quality: int | None


def choose_flaws(random: Random, share: float) -> frozenset[str]:
    """Return what makes the document hard: nothing, or, in `share` of the documents, one or two of `FLAWS`."""
    return frozenset(random.sample(FLAWS, random.choice((1, 1, 2)))) if random.random() < share else frozenset()


def choose_look(random: Random, flaws: frozenset[str], kind: str) -> Look:
    paper, ink = _paper_and_ink(random, flaws, kind)
    worn = "noisy" in flaws
    return Look(
        paper,
        ink,
        desk=_tinted(random, random.uniform(0, 255), 60),
        rule=random.uniform(0.3, 1.0),
        stroke=random.uniform(0.02, 0.12),
        band=random.uniform(0.05, 0.15),
        shade=0.0 if kind in FLAT or "faint" in flaws or random.random() < 0.25 else random.uniform(2, 20),
        blur=random.uniform(0.05, 0.085) if "blurred" in flaws else random.choice((0.0, random.uniform(0.01, 0.03))),
        noise=random.uniform(14, 32) if worn else random.choice((0.0, 0.0, random.uniform(1, 6))),
        quality=random.randint(12, 30) if worn else random.choice((None, None, random.randint(55, 95))),
    )


def _paper_and_ink(random: Random, flaws: frozenset[str], kind: str) -> tuple[Colour, Colour]:
    """Draw two colours whose luma differs by 28 to 55 of 255 if faint, 60 to 100 if coloured, and else by more."""
    colourful = "coloured" in flaws or (kind == "sign" and random.random() < 0.6)
    low, high = (28, 55) if "faint" in flaws else (60, 100) if "coloured" in flaws else (110, 235)
    contrast = random.uniform(low, high)
    paper_above = random.random() < (0.5 if kind in ("sign", "screenshot") else 0.88)
    # Ordinary paper is nearly white, or black where the ink is light: the ink takes up the contrast.
    spare = BRIGHTEST - DARKEST - contrast
    offset = spare * (random.random() if flaws & {"faint", "coloured"} or colourful else random.random() ** 3 * 0.6)
    paper = BRIGHTEST - offset if paper_above else DARKEST + offset
    ink = paper - contrast if paper_above else paper + contrast
    tint = 255.0 if colourful else random.choice((0.0, 10.0, 40.0))
    return _tinted(random, paper, tint), _tinted(random, ink, tint)


def _tinted(random: Random, luma: float, tint: float) -> Colour:
    """Return a colour of the luma whose channels lie up to `tint` apart, as far as the luma leaves room."""
    offsets = [random.uniform(-0.5, 0.5) * tint for _ in LUMA]
    mean = sum(weight * offset for weight, offset in zip(LUMA, offsets, strict=True))
    shifts = [offset - mean for offset in offsets]
    room = min(
        1.0, *((255 - luma) / shift if shift > 0 else luma / -shift for shift in shifts if abs(shift) > 1e-6), 1.0
    )
    red, green, blue = (round(luma + shift * room) for shift in shifts)
    return red, green, blue


def choose_warp(random: Random, flaws: frozenset[str], kind: str, size: tuple[int, int]) -> Warp | None:
    """Draw a turn of up to 8 degrees and a slant; None: the page is seen straight."""
    if kind in FLAT or ("turned" not in flaws and random.random() < 0.6):
        return None
    degrees = random.choice((-1, 1)) * random.uniform(3, 8) if "turned" in flaws else random.gauss(0, 1)
    slant = random.choice((0.0, 0.02, 0.04 if "turned" in flaws else 0.01)) * max(size)
    shifts = np.array([[random.uniform(-slant, slant) for _ in range(2)] for _ in range(4)])
    return Warp.of(size, degrees, shifts)
