"""From the bytes of an image file to the uint8 tiles that the vision encoder eats.

    decode_image: bytes → RGB   limits from the header, EXIF orientation, first frame only
    split_image:  RGB → Tiles   resize and split, byte-equal to transformers' `Idefics3ImageProcessorPil`

A `fast` policy makes the same grid of tiles sooner, of slightly different pixels.

Needs numpy, pillow and simplejpeg only: decoder processes import this module and must start fast.

Two rules, since libraries differ: an EXIF orientation is applied to files and never to PIL objects; transparency is
composited on white.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from smolvlm.config import ImageConfig
from smolvlm.cpu.resize import Box, lanczos
from smolvlm.formats import ALLOWED, is_truncated, sniff
from smolvlm.jpeg import Needed, Size, jpeg_pixels, plain_pixels, reduce_jpeg, upright
from smolvlm.rgb import to_rgb
from smolvlm.tiling import first_size, largest_edge, whole_tiles

Code = Literal[
    "empty", "not_an_image", "unsupported_format", "truncated", "too_many_pixels", "too_many_bytes", "decode_failed"
]
UInt8 = npt.NDArray[np.uint8]

ORIENTATION, ORIENTATIONS = 0x0112, range(1, 9)
SAMPLED = 32  # rows and columns, to see soon that most pictures are not grey


class ImageError(ValueError):
    """An image that cannot be used. `code` is one of `Code` and stable; the message is for people."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[Code, str]]:
        return type(self), (self.code, str(self))


@dataclass(frozen=True)
class ImageLimits:
    """What `decode_image` refuses before it decodes: pixels as the header states them, bytes of the file.

    Pillow's own guard (twice PIL.Image.MAX_IMAGE_PIXELS) stays on behind it. Raises ValueError for a limit beyond that.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 100_000_000

    def __post_init__(self) -> None:
        if min(self.max_pixels, self.max_bytes) < 1:
            raise ValueError(f"max_pixels {self.max_pixels} and max_bytes {self.max_bytes} must be at least 1")
        guard = Image.MAX_IMAGE_PIXELS
        if guard is not None and self.max_pixels > 2 * guard:
            raise ValueError(
                f"max_pixels {self.max_pixels} is above what Pillow opens ({2 * guard}); lower it, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS"
            )


@dataclass(frozen=True)
class ImagePolicy:
    """Deviations from the checkpoint's own rule.

    `longest_edge` (pixels) replaces the checkpoint's; `upscale=False` never enlarges the longest edge, so that a small
    image makes few tiles; `image_splitting` None is the checkpoint's own choice. `max_tiles` lowers the longest edge of
    each image as far as its tiles, the global one among them, need it. `fast` lets `decode_image` reduce JPEGs and
    resizes once where the checkpoint's rule resizes twice: the same grid, other pixels.
    """

    longest_edge: int | None = None
    upscale: bool = True
    image_splitting: bool | None = None
    max_tiles: int | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if self.longest_edge is not None and self.longest_edge < 1:
            raise ValueError(f"longest_edge {self.longest_edge} must be at least 1, or None for the checkpoint's own")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles {self.max_tiles} must be at least 1, or None for no cap")

    def edge_for(self, width: int, height: int, config: ImageConfig) -> int:
        """The longest edge that an image of this size is resized to, in pixels."""
        edge = self.longest_edge or config.longest_edge
        if self.max_tiles is None:
            return edge
        return largest_edge(width, height, config.tile_size, edge, self.upscale, self.max_tiles)

    def sizes(self, width: int, height: int, config: ImageConfig) -> tuple[Size, Size]:
        """The (width, height) that an image of this size is resized to first, and then, whole tiles, to be cut."""
        first = first_size(width, height, self.edge_for(width, height, config), self.upscale)
        splitting = config.do_image_splitting if self.image_splitting is None else self.image_splitting
        return first, whole_tiles(*first, config.tile_size) if splitting else (config.tile_size, config.tile_size)

    def needed(self, config: ImageConfig) -> Needed | None:
        """How far `decode_image` may reduce a picture; None where each of its pixels counts."""
        return partial(self._needed, config) if self.fast else None

    def _needed(self, config: ImageConfig, width: int, height: int) -> Size:
        first, last = self.sizes(width, height, config)
        return min(first[0], last[0]), min(first[1], last[1])


@dataclass(frozen=True)
class Tiles:
    """One image for the encoder: pixels uint8 [N, S, S, 3], RGB. N = rows*cols + 1, row-major, the global tile last;
    or N = 1 and rows = cols = 0 where the image is not split."""

    pixels: UInt8
    rows: int
    cols: int


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file: `pixels` uint8 [H, W, 3], RGB, or [H, W, 1] of a grey one, upright; `format` as Pillow names it;
    `width` and `height` of the picture upright.

    The picture is what `box` covers of the pixels: all of them, in its own size, unless it was reduced.
    """

    pixels: UInt8
    format: str
    width: int
    height: int
    box: Box

    @property
    def image(self) -> Image.Image:
        """The pixels as Pillow has them, in RGB."""
        return _as_image(self.pixels).convert("RGB")


def decode_image(data: bytes, limits: ImageLimits = ImageLimits(), needed: Needed | None = None) -> DecodedImage:
    """Decode a JPEG, PNG, WebP, GIF, TIFF or BMP file: first frame, EXIF orientation applied, RGB.

    Raises ImageError and nothing else. Limits are checked on the header, before any pixel is decoded. A file that lacks
    its end is `truncated` even where Pillow could show what is there: rows of it may be missing. Damage inside a
    complete file is `decode_failed`. Broken EXIF is ignored. With `needed` a JPEG may come out reduced, for
    `split_decoded`; limits and the size given are those of the file.
    """
    kind = _admit(data, limits)
    try:
        pixels = plain_pixels(data, limits.max_pixels) if kind == "JPEG" and needed is None else None
        if pixels is not None:
            return _whole(pixels, kind)
        with quiet_pillow():
            return _decode(data, kind, limits, needed)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", f"{kind} image: {error}") from None
    except UnidentifiedImageError as error:  # its message is where in memory the bytes were
        raise ImageError("decode_failed", f"damaged {kind} image: no readable header") from error
    except Exception as error:  # Pillow's plugins raise nearly every type there is on damaged files
        if isinstance(error, OSError) and "truncated" in str(error):
            raise ImageError("truncated", f"the data of the {kind} image ends early: {error}") from None
        raise ImageError("decode_failed", f"damaged {kind} image: {type(error).__name__}: {error}") from error


def _admit(data: bytes, limits: ImageLimits) -> str:
    """Everything that can be said without Pillow. Gives the format."""
    if not data:
        raise ImageError("empty", "the file holds no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} bytes are more than max_bytes {limits.max_bytes}")
    kind = sniff(data)
    if kind is None:
        raise ImageError("not_an_image", f"no known image format begins with {data[:8]!r}")
    if kind not in ALLOWED:
        raise ImageError("unsupported_format", f"{kind} is not among the accepted formats: {', '.join(ALLOWED)}")
    return kind


def _decode(data: bytes, kind: str, limits: ImageLimits, needed: Needed | None) -> DecodedImage:
    image = _open(data, kind)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{width}×{height} pixels are more than max_pixels {limits.max_pixels}")
    if is_truncated(data, kind):
        raise ImageError("truncated", f"the {kind} file ends after {len(data)} bytes, before its image does")
    if width * height == 0:
        raise ImageError("decode_failed", f"the {kind} image is {width}×{height} pixels")
    if needed is not None and kind == "JPEG":
        size, box = reduce_jpeg(image, needed, _orientation(image))
        return DecodedImage(_upright_pixels(image, data, kind), kind, *size, box)
    return _whole(_upright_pixels(image, data, kind), kind)


def _whole(pixels: UInt8, kind: str) -> DecodedImage:
    height, width, _ = pixels.shape
    return DecodedImage(pixels, kind, width, height, box=(0, 0, width, height))


def _upright_pixels(image: Image.Image, data: bytes, kind: str) -> UInt8:
    pixels = jpeg_pixels(data, image) if kind == "JPEG" else None
    pixels = _as_array(image) if pixels is None else pixels
    return upright(pixels, _orientation(image))  # asked now: Pillow turns TIFFs itself as it loads them


def _open(data: bytes, kind: str) -> Image.Image:
    """Read the header. A cut inside it looks to Pillow like any other damage, so the bytes are asked first."""
    try:
        return Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError:
        raise
    except Exception:
        if is_truncated(data, kind):
            raise ImageError("truncated", f"the {kind} file ends after {len(data)} bytes, inside its header") from None
        raise


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF is an untyped blob that cameras and editors break in every way; the pixels are good
        return 1
    return orientation if isinstance(orientation, int) and orientation in ORIENTATIONS else 1


def split_image(image: Image.Image, config: ImageConfig, policy: ImagePolicy = ImagePolicy()) -> Tiles:
    """Resize an image and cut it into tiles of config.tile_size.

    Byte-equal to transformers' `Idefics3ImageProcessorPil` before its rescaling, with the checkpoint's own sizes: three
    LANCZOS resizes with 8-bit rounding between them. Raises ValueError for an image without pixels.
    """
    return _split(_as_array(image), image.size, (0, 0, *image.size), config, policy)


def split_decoded(decoded: DecodedImage, config: ImageConfig, policy: ImagePolicy = ImagePolicy()) -> Tiles:
    """The same for a decoded file, which may be reduced: into the grid of the picture as it was."""
    return _split(decoded.pixels, (decoded.width, decoded.height), decoded.box, config, policy)


def _split(pixels: UInt8, size: Size, box: Box, config: ImageConfig, policy: ImagePolicy) -> Tiles:
    if 0 in size:
        raise ValueError(f"an image of {size[0]}×{size[1]} pixels cannot be split into tiles")
    pixels, side = _one_band_if_grey(pixels), config.tile_size
    first, last = policy.sizes(*size, config)
    if not policy.fast:
        pixels, box = _resize(pixels, first, box), (0, 0, *first)
    if last == (side, side):
        return _single(_resize(pixels, last, box))
    whole = _resize(pixels, last, box)
    if policy.fast and pixels.size < whole.size:
        return _cut(whole, _resize(pixels, (side, side), box))
    return _cut(whole, _resize(whole, (side, side), (0, 0, *last)))


def _one_band_if_grey(pixels: UInt8) -> UInt8:
    """Scans are often grey, most of them stored in colour: one band, resized once, gives the same bytes as three."""
    some = pixels[:: 1 + len(pixels) // SAMPLED, :: 1 + pixels.shape[1] // SAMPLED]
    is_grey = _is_grey(some) and _is_grey(pixels)
    return np.ascontiguousarray(pixels[..., :1]) if is_grey else pixels


def _is_grey(pixels: UInt8) -> bool:
    return all((pixels[..., 0] == pixels[..., band]).all() for band in range(1, pixels.shape[2]))


def _as_array(image: Image.Image) -> UInt8:
    """[H, W, 3], or [H, W, 1] of a grey image, which spreads over the channels it is assigned to."""
    image.load()
    pixels = np.asarray(image if image.mode == "L" and "transparency" not in image.info else to_rgb(image))
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def _as_image(pixels: UInt8) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _resize(pixels: UInt8, size: Size, box: Box) -> UInt8:
    unchanged = (pixels.shape[1], pixels.shape[0]) == size and box == (0, 0, *size)
    return pixels if unchanged else lanczos(pixels, size, box)


def _single(pixels: UInt8) -> Tiles:
    """The tile is the pixels themselves where they are nobody else's."""
    if pixels.shape[2] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return Tiles((pixels if pixels.flags.carray else pixels.copy())[None], rows=0, cols=0)


def _cut(pixels: UInt8, whole: UInt8) -> Tiles:
    """Row-major crops, then the whole image as one tile."""
    side = len(whole)
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    tiles = np.empty((rows * cols + 1, side, side, 3), np.uint8)
    crops = pixels.reshape(rows, side, cols, side, -1).swapaxes(1, 2)  # [rows, cols, S, S, C]
    tiles[:-1].reshape(rows, cols, side, side, 3)[:] = crops
    tiles[-1] = whole
    return Tiles(tiles, rows, cols)


_quiet_lock = threading.Lock()
_quiet_users = 0
_quiet_stack = ExitStack()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings (bombs, corrupt EXIF, odd TIFF tags) from printing, and from raising under `-W error`.

    Python's filters are one list for all threads: the first user sets the filter, the last one restores the list, so
    concurrent decodes do not undo each other. Warnings of other modules pass.
    """
    global _quiet_users
    with _quiet_lock:
        if _quiet_users == 0:
            _quiet_stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                _quiet_stack.close()
