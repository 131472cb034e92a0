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


@dataclass(frozen=True)
class Colours:
    """Paper, text, rules, and what lies around the paper."""

    paper: Colour
    ink: Colour
    rule: Colour
    desk: Colour


@dataclass(frozen=True)
class Wear:
    """What is done to the drawn page.

    shade: amplitude of uneven light and texture in grey levels.
    blur: standard deviation in font sizes. noise: standard deviation in grey levels. quality: of JPEG; None: no JPEG.
    """

    shade: float
    blur: float
    noise: float
    quality: int | None


def choose_flaws(random: Random, share: float) -> frozenset[str]:
    """Return what makes the document hard: nothing, or, in `share` of the documents, one or two of `FLAWS`."""
    return frozenset(random.sample(FLAWS, random.choice((1, 1, 2)))) if random.random() < share else frozenset()


def choose_wear(random: Random, flaws: frozenset[str], kind: str) -> Wear:
    flat = kind in FLAT or random.random() < 0.25
    return Wear(
        shade=0.0 if flat else random.uniform(0, 24),
        blur=random.uniform(0.05, 0.085) if "blurred" in flaws else random.choice((0.0, random.uniform(0, 0.03))),
        noise=random.uniform(14, 32) if "noisy" in flaws else random.choice((0.0, 0.0, random.uniform(1, 6))),
        quality=random.randint(12, 30) if "noisy" in flaws else random.choice((None, None, random.randint(55, 95))),
    )


def choose_colours(random: Random, flaws: frozenset[str], kind: str) -> Colours:
    """Draw colours whose luma differs by at least 100 of 255, 60 to 100 if coloured, 28 to 55 if faint."""
    colourful = "coloured" in flaws or (kind == "sign" and random.random() < 0.6)
    tint = 255 if colourful else random.choice((0, 10, 30))
    contrast = (
        random.uniform(28, 55)
        if "faint" in flaws
        else random.uniform(60, 100)
        if "coloured" in flaws
        else (random.uniform(100, 235))
    )
    dark = random.uniform(5, 250 - contrast)
    if "faint" not in flaws and not colourful:
        dark = min(dark, random.uniform(5, 70))
    light = dark + contrast if random.random() < 0.5 else min(max(250.0, dark + contrast), 250.0)
    if "faint" in flaws or "coloured" in flaws:
        light = dark + contrast
    paper, ink = (light, dark) if random.random() < (0.5 if kind in ("sign", "screenshot") else 0.85) else (dark, light)
    paper_colour, ink_colour = _tinted(random, paper, tint), _tinted(random, ink, tint)
    share = random.uniform(0.3, 0.8)
    return Colours(
        paper_colour, ink_colour, _between(paper_colour, ink_colour, share), _tinted(random, random.uniform(0, 255), 60)
    )


def _tinted(random: Random, luma: float, tint: float) -> Colour:
    """Return a colour of the luma whose channels lie up to `tint` apart, as far as the luma leaves room."""
    offsets = [random.uniform(-0.5, 0.5) * tint for _ in LUMA]
    mean = sum(weight * offset for weight, offset in zip(LUMA, offsets, strict=True))
    shifts = [offset - mean for offset in offsets]
    room = min(1.0, *((255 - luma) / s if s > 0 else luma / -s for s in shifts if abs(s) > 1e-6), 1.0)
    red, green, blue = (round(min(max(luma + shift * room, 0), 255)) for shift in shifts)
    return red, green, blue


def _between(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def choose_warp(random: Random, flaws: frozenset[str], kind: str, size: tuple[int, int]) -> Warp | None:
    """Draw a turn of up to 8 degrees and a slant; None: the page is seen straight."""
    if kind in FLAT or ("turned" not in flaws and random.random() < 0.6):
        return None
    degrees = random.choice((-1, 1)) * random.uniform(3, 8) if "turned" in flaws else random.gauss(0, 1)
    slant = random.choice((0.0, 0.02, 0.04 if "turned" in flaws else 0.01)) * max(size)
    shifts = np.array([[random.uniform(-slant, slant) for _ in range(2)] for _ in range(4)])
    return Warp.of(size, degrees, shifts)
