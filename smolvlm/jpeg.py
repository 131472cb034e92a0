"""JPEGs decoded sooner: straight into an array, by the library that Pillow itself stands on; or smaller than they are,
where it leaves frequencies out, and most of the time with them."""

import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from smolvlm.cpu.pack import pack
from smolvlm.cpu.resize import Box

UInt8 = npt.NDArray[np.uint8]

Number = TypeVar("Number", int, float)
Size = tuple[int, int]
Needed = Callable[[int, int], Size]
"""From the (width, height) of an upright picture to the size that it must keep."""

SLACK = 15 / 16  # of the needed size: a photograph 4000 pixels wide is halved for 2048
MIRRORED, UPSIDE_DOWN, SIDEWAYS = (2, 3, 6, 7), (3, 4, 7, 8), (5, 6, 7, 8)  # EXIF orientations, by what undoes them

COLOURS = {"RGB": "RGB", "L": "GRAY"}
BANDS = {3: "RGB", 1: "GRAY"}

PLAIN_HEAD_BYTES = 4096
SEGMENT = struct.Struct(">BBHBHHB")  # marker and length; then, of a frame, bits, height, width, bands
FRAMES, TABLES, SCAN = (0xC0, 0xC1, 0xC2), (0xC4, 0xDB, 0xDD), 0xDA
JFIF = b"\xff\xe0\0\x10JFIF\0"
Frame = tuple[int, int, int]
"""Height, width, bands."""


def plain_pixels(data: bytes, max_pixels: int) -> UInt8 | None:
    """Pixels [H, W, 3] or [H, W, 1], as Pillow would load them, of a JPEG whose header says nothing but how to decode
    it: to open the file alone takes Pillow a tenth of a small picture's time.

    None where there is more to know: an orientation or other metadata, more than `max_pixels`, a cut, damage.
    """
    frame = _plain_frame(data)
    if frame is None or frame[0] * frame[1] > max_pixels or not data.endswith(b"\xff\xd9"):
        return None
    height, width, bands = frame
    return _decoded(data, BANDS.get(bands), (width, height))


def jpeg_pixels(data: bytes, image: Image.Image) -> UInt8 | None:
    """Pixels [H, W, 3] or [H, W, 1] of a JPEG that Pillow has opened, as it would load them, in half its time: Pillow
    decodes into pixels of four bytes, which an array gets by way of two copies.

    None where Pillow must look itself: four colours, a file drafted smaller, damage, whose name is Pillow's to give.
    """
    return _decoded(data, COLOURS.get(image.mode), image.size)


def reduce_jpeg(image: Image.Image, needed: Needed, orientation: int) -> tuple[Size, Box]:
    """Have a JPEG that is not loaded yet decoded at a half, a quarter or an eighth, keeping SLACK of what is needed.

    Gives the upright size as it was, in pixels, and the part of the smaller upright image that the picture covers:
    that image has whole pixels, while a half of the picture may not.
    """
    size = _turned(image.size, orientation)
    width, height = _turned(needed(*size), orientation)
    drafted = image.draft(None, (max(int(width * SLACK), 1), max(int(height * SLACK), 1)))
    covered = image.size if drafted is None else drafted[1][2:]
    return size, _box(image.size, covered, orientation)


def upright(pixels: UInt8, orientation: int) -> UInt8:
    """Undo an EXIF orientation, 1 (upright) to 8, of pixels [H, W, C]."""
    turned = pixels.swapaxes(0, 1) if orientation in SIDEWAYS else pixels
    turned = turned[:, ::-1] if orientation in MIRRORED else turned
    turned = turned[::-1] if orientation in UPSIDE_DOWN else turned
    return pixels if turned is pixels else pack(turned)


def _plain_frame(data: bytes) -> Frame | None:
    """What is decoded, where nothing but tables and a JFIF header stands before its first scan."""
    position, frame = 2, None
    while position + SEGMENT.size < min(len(data), PLAIN_HEAD_BYTES):
        start, marker, length, bits, height, width, bands = SEGMENT.unpack_from(data, position)
        if start != 0xFF or length < 2:
            return None
        if marker == SCAN:
            return frame
        if marker in FRAMES and bits == 8:
            frame = height, width, bands
        elif marker not in TABLES and data[position : position + len(JFIF)] != JFIF:
            return None
        position += 2 + length
    return None


def _decoded(data: bytes, colours: str | None, size: Size) -> UInt8 | None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if colours is None or (width, height) != size:
            return None
        pixels: UInt8 = simplejpeg.decode_jpeg(data, colours, fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels


def _turned(size: tuple[Number, Number], orientation: int) -> tuple[Number, Number]:
    return (size[1], size[0]) if orientation in SIDEWAYS else size


def _box(size: Size, covered: tuple[float, float], orientation: int) -> Box:
    """What is covered begins in the first pixel of the file, which is not the first one of the upright image."""
    (width, height), (right, bottom) = _turned(size, orientation), _turned(covered, orientation)
    left = width - right if orientation in MIRRORED else 0
    top = height - bottom if orientation in UPSIDE_DOWN else 0
    return left, top, left + right, top + bottom
