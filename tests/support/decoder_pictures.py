"""Small pictures for decoder processes, some of which kill theirs (`sitecustomize`), and how they are split."""

import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy

CONFIG = ImageConfig(tile_size=32, longest_edge=128, do_image_splitting=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
POLICY = ImagePolicy(upscale=False)


def picture(seed: int, poison: str | None = None, side: int | None = None) -> bytes:
    """A PNG of noise, square if it is given a side in pixels."""
    rng = np.random.default_rng(seed)
    width, height = (side, side) if side else rng.integers(20, 150, 2).tolist()
    target, info = io.BytesIO(), PngInfo()
    if poison:
        info.add_text("comment", f"poison:{poison}")
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(target, "PNG", pnginfo=info)
    return target.getvalue()
