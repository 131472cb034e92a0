"""Training data that is made by hand: one short word on white, with the place of every character."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from smolvlm.training.examples import Labelled

WORDS = ("cat", "dog", "tree", "house", "12:30", "sun", "moon", "£4.50", "river", "No.",
         "bread", "milk", "egg", "salt", "OPEN", "road", "77", "bus", "car", "key")  # fmt: skip
FONT_PX, LEFT, TOP = 15, 4.0, 20.0


@dataclass(frozen=True)
class WordPictures:
    """Index → a word on a picture of `size` (width, height); every index from `empty_from` on has an empty text."""

    size: tuple[int, int] = (64, 64)
    empty_from: int | None = None

    def __call__(self, index: int) -> Labelled:
        text = WORDS[index % len(WORDS)]
        image, boxes = _drawn(text, self.size, index)
        is_empty = self.empty_from is not None and index >= self.empty_from
        return Labelled(f"picture {index}", image, " " if is_empty else text, None if is_empty else boxes)


def _drawn(text: str, size: tuple[int, int], index: int) -> tuple[Image.Image, np.ndarray]:
    image = Image.new("RGB", size, (255, 255, 255 - index % 50))  # no two of fifty are the same
    draw, font, left, boxes = ImageDraw.Draw(image), _font(), LEFT, []
    for character in text:
        draw.text((left, TOP), character, (0, 0, 0), font)
        width = font.getlength(character)
        boxes.append((left, TOP, left + width, TOP + FONT_PX))
        left += width
    return image, np.array(boxes, np.float32)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_PX)
