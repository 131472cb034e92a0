"""Any pixels that Pillow knows as 8-bit RGB."""

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8 = npt.NDArray[np.uint8]

FLOAT32_MAX, FLOAT32_TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to 8-bit RGB. Transparency is composited on white.

    16-bit grey (I;16*) keeps its high byte. I and F carry no scale: F within 0..1 spans black to white, values within
    0..255 stay as they are, those within 0..65535 are taken for 16-bit, all else is stretched from its minimum to its
    maximum; NaN is black.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "La":  # Pillow knows no way from premultiplied grey to anything but LA
        image = image.convert("LA")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: Image.Image) -> UInt8:
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return (values >> 8).astype(np.uint8)
    values = np.clip(np.nan_to_num(values.astype(np.float64)), -FLOAT32_MAX, FLOAT32_MAX)
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 65535:
        values = (values - low) / max(high - low, FLOAT32_TINY) * 255  # a flat image is black
    elif high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)
