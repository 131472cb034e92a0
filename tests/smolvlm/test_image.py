"""Tiles against transformers' PIL image processor, modes and policies; decoding against Pillow, limits and damage."""

import io
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from smolvlm.config import ImageConfig
from smolvlm.image import DecodedImage, ImageError, ImageLimits, ImagePolicy, Tiles, decode_image, split_image
from smolvlm.rgb import to_rgb

DATA = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"
CONFIGS = {
    "512": ImageConfig(512, 2048, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "384": ImageConfig(384, 1536, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "32": ImageConfig(32, 128, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def noise(mode: str, width: int, height: int) -> Image.Image:
    """An image of any mode with every value in play."""
    rng = np.random.default_rng(width * 7919 + height)
    shape = (height, width)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, shape, np.uint8) * 255).convert("1")
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        return Image.frombytes(mode, (width, height), rng.integers(0, 65536, shape).astype(order).tobytes())
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**20), 2**20, shape, np.int32))
    if mode == "F":
        return Image.fromarray(rng.random(shape, np.float32) * 1000 - 500)
    if mode in ("P", "PA"):
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        return image.convert("PA") if mode == "PA" else image
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), rng.integers(0, 256, (*shape, bands), np.uint8).tobytes())


def transparent_palette(width: int, height: int) -> Image.Image:
    image = noise("P", width, height)
    image.info["transparency"] = 5
    return image


MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
)
SIZES = (
    *((1, 1), (1, 2), (3, 3), (3, 5), (4, 1), (8, 3), (2, 8), (7, 7)),  # 3×N and N×3 look like channels to guessers
    *((640, 480), (481, 641), (997, 991), (1013, 337), (600, 600), (512, 512), (513, 512), (384, 384)),
    *((10, 1000), (1000, 10), (1, 300), (300, 1), (1414, 1000), (1275, 1650), (2048, 1536), (2050, 900)),
    *((2500, 40), (4001, 3), (5, 4999), (1920, 1080)),
)
GALLERY = [*((mode, 61, 11) for mode in MODES), *(("RGB", *size) for size in SIZES)]


def reference(image: Image.Image, config: ImageConfig, splitting: bool, resize: bool = True) -> Tiles:
    """What transformers hands on, before it rescales."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": config.longest_edge},
        max_image_size={"longest_edge": config.tile_size},
        do_image_splitting=splitting,
        do_resize=resize,
        do_rescale=False,
        do_normalize=False,
        return_row_col_info=True,
    )
    # transformers guesses I and F; conversion is ours, and has its own tests
    batch: Any = processor(to_rgb(image), return_tensors="np")
    pixels = batch["pixel_values"][0].transpose(0, 2, 3, 1)
    return Tiles(pixels, batch["rows"][0][0], batch["cols"][0][0])


def assert_same(ours: Tiles, theirs: Tiles) -> None:
    assert ours.pixels.dtype == np.uint8 == theirs.pixels.dtype
    assert (ours.rows, ours.cols) == (theirs.rows, theirs.cols)
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)


def test_gallery_is_as_large_as_promised() -> None:
    assert len(GALLERY) >= 40


@pytest.mark.parametrize("name", ["512", "384"])
@pytest.mark.parametrize(("mode", "width", "height"), GALLERY)
def test_tiles_are_byte_equal_to_transformers(mode: str, width: int, height: int, name: str) -> None:
    image, config = noise(mode, width, height), CONFIGS[name]
    assert_same(split_image(image, config), reference(image, config, splitting=True))
    unsplit = split_image(image, config, ImagePolicy(image_splitting=False))
    assert_same(unsplit, reference(image, config, splitting=False))


@settings(max_examples=150, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700), edge=st.integers(1, 400), tile=st.integers(3, 70))
def test_tiles_are_byte_equal_for_any_sizes(width: int, height: int, edge: int, tile: int) -> None:
    config = ImageConfig(tile, edge, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = noise("RGB", width, height)
    assert_same(split_image(image, config), reference(image, config, splitting=True))


@pytest.mark.parametrize("size", [(5000, 100), (100, 5000), (4500, 900)])
def test_first_resize_is_capped_like_transformers(size: tuple[int, int]) -> None:
    config = ImageConfig(1024, 5000, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = noise("RGB", *size)
    ours = split_image(image, config)
    assert_same(ours, reference(image, config, splitting=True))
    assert max(ours.rows, ours.cols) == 4


@pytest.mark.parametrize("name", ["256m", "500m", "2.2b-v2"])
def test_published_policies_are_those_tested_here(name: str) -> None:
    if not DATA.exists():
        pytest.skip("the published configs are not beside this checkout")
    assert ImageConfig.from_pretrained(DATA / name) == CONFIGS["384" if name == "2.2b-v2" else "512"]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((2480, 3508), (4, 3)),  # A4
        ((2550, 3300), (4, 4)),  # US letter
        ((900, 900), (4, 4)),
        ((1600, 1200), (3, 4)),
        ((1920, 1080), (3, 4)),
        ((2000, 1000), (2, 4)),
        ((2000, 400), (1, 4)),
    ],
)
def test_known_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    tiles = split_image(Image.new("RGB", size), CONFIGS["512"])
    assert (tiles.rows, tiles.cols) == grid
    assert tiles.pixels.shape == (grid[0] * grid[1] + 1, 512, 512, 3)


def test_crops_are_row_major_and_the_global_tile_is_last() -> None:
    image = Image.new("RGB", (128, 64))
    for index in range(8):
        image.paste((index * 30, 0, 0), (index % 4 * 32, index // 4 * 32, index % 4 * 32 + 32, index // 4 * 32 + 32))
    tiles = split_image(image, CONFIGS["32"])
    assert [int(tile[16, 16, 0]) for tile in tiles.pixels[:-1]] == [0, 30, 60, 90, 120, 150, 180, 210]
    np.testing.assert_array_equal(tiles.pixels[-1], np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)))


def test_a_small_image_stays_small_without_upscaling() -> None:
    image, config = noise("RGB", 386, 386), CONFIGS["512"]
    tiles = split_image(image, config, ImagePolicy(upscale=False))
    assert (tiles.rows, tiles.cols, len(tiles.pixels)) == (0, 0, 1)
    np.testing.assert_array_equal(tiles.pixels[0], np.asarray(image.resize((512, 512), Image.Resampling.LANCZOS)))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 128), height=st.integers(1, 128))
def test_without_upscaling_only_the_first_resize_is_left_out(width: int, height: int) -> None:
    image, config = noise("RGB", width, height), CONFIGS["32"]
    ours = split_image(image, config, ImagePolicy(upscale=False))
    assert_same(ours, reference(image, config, splitting=True, resize=False))


def test_without_upscaling_large_images_still_shrink() -> None:
    image, config = noise("RGB", 300, 200), CONFIGS["32"]
    assert_same(split_image(image, config, ImagePolicy(upscale=False)), split_image(image, config))


@pytest.mark.parametrize("edge", [32, 64, 100, 256])
def test_longest_edge_replaces_the_checkpoints(edge: int) -> None:
    image, config = noise("RGB", 90, 60), CONFIGS["32"]
    theirs = reference(image, ImageConfig(32, edge, True, config.mean, config.std), splitting=True)
    assert_same(split_image(image, config, ImagePolicy(longest_edge=edge)), theirs)


def test_splitting_follows_the_checkpoint_unless_told() -> None:
    config = ImageConfig(32, 128, False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = noise("RGB", 90, 60)
    assert split_image(image, config).rows == 0
    assert split_image(image, config, ImagePolicy(image_splitting=True)).rows == 3


def test_tiles_can_be_written_to() -> None:
    for policy in (ImagePolicy(), ImagePolicy(image_splitting=False), ImagePolicy(upscale=False)):
        pixels = split_image(noise("RGB", 20, 20), CONFIGS["32"], policy).pixels
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="longest_edge 0"):
        ImagePolicy(longest_edge=0)
    with pytest.raises(ValueError, match="0×5 pixels"):
        split_image(Image.new("RGB", (0, 5)), CONFIGS["32"])


def grey_but_for_one_pixel() -> Image.Image:
    image = noise("L", 200, 150).convert("RGB")
    image.putpixel((77, 33), (1, 2, 3))
    return image


@pytest.mark.parametrize("make", [lambda: noise("L", 200, 150).convert("RGB"), grey_but_for_one_pixel])
@pytest.mark.parametrize("splitting", [True, False])
def test_grey_images_take_a_shorter_way_to_the_same_tiles(make: Callable[[], Image.Image], splitting: bool) -> None:
    image, config = make(), CONFIGS["32"]
    ours = split_image(image, config, ImagePolicy(image_splitting=splitting))
    assert_same(ours, reference(image, config, splitting))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 8), (8, 3), (2, 2)])
def test_tiny_images_of_every_mode_become_tiles(mode: str, size: tuple[int, int]) -> None:
    image = noise(mode, *size)
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).size == size
    assert split_image(image, CONFIGS["32"]).pixels.shape[1:] == (32, 32, 3)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P with a transparent colour"])
def test_transparency_is_composited_on_white_like_transformers(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = transparent_palette(9, 9) if mode.startswith("P ") else noise(mode, 9, 9)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), convert_to_rgb(image, return_numpy=True))


def test_fully_transparent_is_white_and_opaque_is_unchanged() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (9, 8, 7, 255))).getpixel((0, 0)) == (9, 8, 7)
    assert to_rgb(Image.new("La", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255, 256, 65535]], np.uint16), [0, 0, 1, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[-1, np.nan, 1]], np.float32), [0, 128, 255]),
        (np.array([[7, 7]], np.float32), [7, 7]),
        (np.array([[-7, -7]], np.float32), [0, 0]),
        (np.array([[0, np.inf]], np.float32), [0, 255]),
    ],
)
def test_modes_without_a_scale(values: np.ndarray, expected: list[int]) -> None:
    rgb = np.asarray(to_rgb(Image.fromarray(values)))
    assert rgb[0, :, 0].tolist() == expected
    assert (rgb == rgb[..., :1]).all()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002 (Pillow's name)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def code_of(data: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, limits or ImageLimits())
    return caught.value.code


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG"])
def test_every_accepted_format_decodes_like_pillow(format: str) -> None:  # noqa: A002
    data = encoded(noise("RGB", 40, 30), format)
    decoded = decode_image(data)
    assert (decoded.format, decoded.width, decoded.height, decoded.image.mode) == (format, 40, 30, "RGB")
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:  # noqa: A002
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise("RGB", 24, 16), format, exif=exif)
    decoded = decode_image(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(expected))
    assert (decoded.width, decoded.height) == ((16, 24) if orientation > 4 else (24, 16))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # orientation 99
        b"nonsense",
    ],
)
def test_broken_exif_does_not_cost_the_image(format: str, exif: bytes) -> None:  # noqa: A002
    decoded = decode_image(encoded(noise("RGB", 24, 16), format, exif=exif))
    assert (decoded.width, decoded.height) == (24, 16)


def test_only_the_first_frame_counts() -> None:
    frames = [noise("RGB", 20, 10), Image.new("RGB", (20, 10), "red")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):  # noqa: A001
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        single = encoded(frames[0], format, **options)
        np.testing.assert_array_equal(np.asarray(decode_image(data).image), np.asarray(decode_image(single).image))


def test_mpo_is_a_jpeg() -> None:
    data = encoded(noise("RGB", 20, 10), "MPO", save_all=True, append_images=[noise("RGB", 20, 10)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_image(data).format == "JPEG"


def test_pixel_modes_of_files_become_rgb() -> None:
    cases = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    cases += [("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")]
    cases += [("JPEG", mode) for mode in ("L", "CMYK", "YCbCr")] + [("WEBP", "RGBA"), ("BMP", "P"), ("GIF", "L")]
    for format, mode in cases:  # noqa: A001
        decoded = decode_image(encoded(noise(mode, 9, 7), format))
        assert (decoded.image.mode, decoded.width, decoded.height) == ("RGB", 9, 7), (format, mode)


def test_limits_hold_at_their_border() -> None:
    data = encoded(noise("RGB", 20, 10), "PNG")
    assert decode_image(data, ImageLimits(max_pixels=200, max_bytes=len(data))).width == 20
    assert code_of(data, ImageLimits(max_pixels=199)) == "too_many_pixels"
    assert code_of(data, ImageLimits(max_bytes=len(data) - 1)) == "too_many_bytes"


def test_limits_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels 0 and"):
        ImageLimits(max_pixels=0)
    with pytest.raises(ValueError, match=r"max_pixels 1000000000 is above what Pillow opens \(178956970\)"):
        ImageLimits(max_pixels=10**9)


def test_what_is_no_image() -> None:
    assert code_of(b"") == "empty"
    assert code_of(b"<html>not found</html>") == "not_an_image"
    assert code_of(bytes(1000)) == "not_an_image"


def test_damage_inside_a_complete_file() -> None:
    data = bytearray(encoded(noise("RGB", 40, 30), "PNG"))
    data[60:90] = bytes(30)
    assert code_of(bytes(data)) == "decode_failed"


BOMBS = """
import io, resource, struct, sys, time, zlib
from PIL import Image
from smolvlm.image import ImageError, decode_image

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def png(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")

def saved(format, offset, packed):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format)
    data = bytearray(buffer.getvalue())
    if format == "JPEG":
        offset = data.find(b"\\xff\\xc0") + 5
    data[offset:offset + len(packed)] = packed
    return bytes(data)

bombs = {
    "png": png(60000, 60000), "png just above": png(10000, 5001), "png above pillow's warning": png(10000, 10000),
    "jpeg": saved("JPEG", 0, struct.pack(">HH", 65000, 65000)),
    "gif": saved("GIF", 6, struct.pack("<HH", 65535, 65535)),
    "bmp": saved("BMP", 18, struct.pack("<ii", 100000, 100000)),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\\0" * 4 + b"\\xfe\\x3f\\0" * 2,
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in bombs.items():
    start = time.perf_counter()
    try:
        decode_image(data)
    except ImageError as error:
        print(name, error.code, "slow" if time.perf_counter() - start > 1 else "quick", sep="|")
print("grew", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep="|")
"""


def test_bombs_are_refused_quickly_and_in_little_memory() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", BOMBS], capture_output=True, text=True, check=True)
    lines = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert int(lines.pop("grew")) < 256
    webp = lines.pop("webp")
    assert set(lines.values()) == {"too_many_pixels|quick"}
    assert webp in ("too_many_pixels|quick", "decode_failed|quick")
    assert len(lines) == 6


def test_importing_it_is_light() -> None:
    script = (
        "import smolvlm.image, sys; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_survive_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "it ends early")))
    assert (error.code, str(error)) == ("truncated", "it ends early")


def warning_tiff() -> bytes:
    """Pillow opens it, and warns about its metadata."""
    data = encoded(noise("RGB", 9, 9), "TIFF")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for position in range(8, len(data)):
            changed = data[:position] + b"\xff" + data[position + 1 :]
            try:
                Image.open(io.BytesIO(changed)).load()
            except Exception:
                caught.clear()
                continue
            if caught and isinstance(decoded_or_code(changed), DecodedImage):
                return changed
    raise AssertionError("no such file found")


def decoded_or_code(data: bytes) -> DecodedImage | str:
    try:
        return decode_image(data)
    except ImageError as error:
        return error.code


def test_pillows_warnings_neither_show_nor_raise_in_many_threads() -> None:
    data = warning_tiff()
    results: list[int] = []

    def work() -> None:
        results.extend(decode_image(data).width for _ in range(50))

    before = list(warnings.filters)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [9] * 400
    assert warnings.filters == before


def test_lab_conversion_is_pillows() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = Image.new("RGB", (4, 4), (200, 60, 30))
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert converted is not None
    back = np.asarray(to_rgb(converted)).astype(int)
    assert np.abs(back - (200, 60, 30)).max() <= 3
