"""What a request says about its images: the bytes in `data:` URLs, and how to split them."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import pybase64

from smolvlm.image import ImagePolicy, Tiles

_DATA_URL = re.compile(r"data:(?:image/[a-zA-Z0-9.+-]{1,64})?;base64,", re.ASCII | re.IGNORECASE)
_HEAD_CHARS = 128


class ImageRefused(ValueError):
    """An image that is not taken; `code` is one of `errors.IMAGE_MESSAGES`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class SplitImage:
    """An image as the model sees it, and its size in pixels after EXIF rotation."""

    tiles: Tiles
    width: int
    height: int


def data_url_bytes(url: str, max_bytes: int) -> bytes:
    """Return what a base64 `data:` URL holds. Raises ImageRefused; nothing but the string itself is looked at."""
    if not url[:5].lower() == "data:":
        raise ImageRefused("unsupported_url")
    head = _DATA_URL.match(url[:_HEAD_CHARS])
    if head is None:
        raise ImageRefused("invalid_data_url")
    if (len(url) - head.end()) // 4 * 3 > max_bytes + 3:
        raise ImageRefused("too_many_bytes")
    try:
        return pybase64.b64decode(url[head.end() :], validate=True)
    except ValueError:
        raise ImageRefused("invalid_data_url") from None


@lru_cache
def policy_for(base: ImagePolicy, detail: str, max_tiles: int | None) -> ImagePolicy:
    """Return the operator's policy as a request bends it: one tile, the checkpoint's own splitting, a cap on tiles."""
    policy = replace(base, max_tiles=max_tiles)
    if detail == "low":
        return replace(policy, image_splitting=False)
    return replace(policy, image_splitting=True, upscale=True) if detail == "high" else policy
