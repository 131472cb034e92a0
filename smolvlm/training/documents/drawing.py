"""Draws a page and wears it down."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from smolvlm.training.documents.appearance import Colour, Colours, Wear, _between
from smolvlm.training.documents.layout import Page

SHADES = 5  # uneven light: a grid of random greys, stretched over the page


def draw(page: Page, size: tuple[int, int], colours: Colours, wear: Wear, noise: np.random.Generator) -> Image.Image:
    """Draw the page on paper of the size (width, height); RGB."""
    image = _paper(size, colours.paper, wear.shade, noise)
    pen = ImageDraw.Draw(image)
    for band in page.bands:
        pen.rectangle(band, _between(colours.paper, colours.ink, 0.12))
    for x0, y0, x1, y1 in page.lines:
        pen.line((x0, y0, x1, y1), colours.rule, 1 + min(size) // 400)
    for run in page.runs:
        pen.text((run.x, run.y), run.text, colours.ink, run.face.font, anchor="ls")
    return image


def _paper(size: tuple[int, int], colour: Colour, shade: float, noise: np.random.Generator) -> Image.Image:
    if not shade:
        return Image.new("RGB", size, colour)
    coarse = noise.standard_normal((SHADES, SHADES), np.float32)
    light = Image.fromarray(coarse * np.float32(shade / 2)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(light)[..., None] + np.array(colour, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def wear_down(image: Image.Image, wear: Wear, size: float, noise: np.random.Generator) -> Image.Image:
    """Blur, add noise and compress; `size` is that of the font in pixels."""
    if wear.blur:
        image = image.filter(ImageFilter.GaussianBlur(wear.blur * size))
    if wear.noise:
        image = _noisy(image, wear.noise, noise)
    return _compressed(image, wear.quality) if wear.quality else image


def _noisy(image: Image.Image, deviation: float, noise: np.random.Generator) -> Image.Image:
    grain = noise.standard_normal((image.height, image.width, 1), np.float32) * np.float32(deviation)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
