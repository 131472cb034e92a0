"""Draws a page and wears it down. All work on pixels is Pillow's, most of it on one channel: how much ink there is."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from smolvlm.training.documents.appearance import Colour, Look
from smolvlm.training.documents.geometry import Warp
from smolvlm.training.documents.layout import Page

COVER = 255
LIGHTS = 5  # uneven light: a grid of random greys, stretched over the page
GRAIN = 1024  # edge of the field of noise that documents cut theirs from; wider than most of them
DEVIATION = 40  # of that field in grey levels, so that it is rarely clipped
MIDDLE = 128
LEAST_BLUR = 0.3  # pixels; less would not be seen


def draw(
    page: Page, size: tuple[int, int], font_size: float, look: Look, warp: Warp | None, random: Random
) -> Image.Image:
    """Draw the page on an image of the size (width, height), its type `font_size` pixels high; RGB."""
    ink = draw_ink(page, size, font_size, look)
    if warp:
        ink = warp.image(ink)
    if look.blur * font_size > LEAST_BLUR:
        ink = ink.filter(ImageFilter.GaussianBlur(look.blur * font_size))
    image = Image.composite(Image.new("RGB", size, look.ink), _paper(size, look, warp, random), ink)
    if look.noise:
        image = ImageChops.add(image, _grain(size, look.noise, random), 1, -MIDDLE)
    return _compressed(image, look.quality) if look.quality else image


def draw_ink(page: Page, size: tuple[int, int], font_size: float, look: Look) -> Image.Image:
    """Draw how much ink there is on the page of the size (width, height), its type `font_size` pixels high; 0 to 255,
    L."""
    ink = Image.new("L", size)
    pen = ImageDraw.Draw(ink)
    for band in page.bands:
        pen.rectangle(band, round(COVER * look.band))
    stroke = max(round(look.stroke * font_size), 1)
    for line in page.lines:
        pen.line(line, round(COVER * look.rule), stroke)
    for run in page.runs:
        pen.text((run.x, run.y), run.text, COVER, run.face.font, anchor="ls")
    return ink


def _paper(size: tuple[int, int], look: Look, warp: Warp | None, random: Random) -> Image.Image:
    paper = _lit(size, look.paper, look.shade, random) if look.shade else Image.new("RGB", size, look.paper)
    if warp:
        around = Image.new("L", size, COVER)
        ImageDraw.Draw(around).polygon([tuple(corner) for corner in warp.outline()], 0)
        paper.paste(look.desk, (0, 0), around)
    return paper


def _lit(size: tuple[int, int], colour: Colour, shade: float, random: Random) -> Image.Image:
    lights = [random.uniform(-shade, shade) for _ in range(LIGHTS * LIGHTS)]
    pixels = bytes(round(min(max(level + light, 0), 255)) for light in lights for level in colour)
    return Image.frombytes("RGB", (LIGHTS, LIGHTS), pixels).resize(size, Image.Resampling.BICUBIC)


def _grain(size: tuple[int, int], deviation: float, random: Random) -> Image.Image:
    field = _field()
    width, height = size
    across, down = (random.randint(0, max(GRAIN - edge, 0)) for edge in size)
    cut = field.crop((across, down, across + min(width, GRAIN), down + min(height, GRAIN))).resize(size)
    grain = cut.point([round(MIDDLE + (grey - MIDDLE) * deviation / DEVIATION) for grey in range(256)])
    return Image.merge("RGB", (grain, grain, grain))


@cache
def _field() -> Image.Image:
    greys = np.random.default_rng(0).normal(MIDDLE, DEVIATION, (GRAIN, GRAIN))
    return Image.fromarray(greys.clip(0, 255).astype(np.uint8))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
