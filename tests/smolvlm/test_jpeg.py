"""JPEGs read past Pillow: the same pixels, and the same word for whatever is wrong with a file."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import smolvlm.image
from smolvlm.image import DecodedImage, ImageError, decode_image
from smolvlm.jpeg import jpeg_pixels, plain_pixels


def picture(mode: str, width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + random.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert(mode)


def jpeg(mode: str = "RGB", width: int = 67, height: int = 45, **options: Any) -> bytes:
    target = io.BytesIO()
    picture(mode, width, height).save(target, "JPEG", **options)
    return target.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["JPEG"])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [20, 75, 100])
@pytest.mark.parametrize("size", [(67, 45), (1, 1), (16, 16), (301, 7)])
def test_pixels_are_pillows(
    mode: str, progressive: bool, subsampling: str, quality: int, size: tuple[int, int]
) -> None:
    data = jpeg(mode, *size, progressive=progressive, subsampling=subsampling, quality=quality)
    pixels = jpeg_pixels(data, opened(data))
    assert pixels is not None
    np.testing.assert_array_equal(pixels.squeeze(2) if mode == "L" else pixels, np.asarray(opened(data)))


@pytest.mark.parametrize(
    "options",
    [
        {"keep_rgb": True, "subsampling": "4:4:4"},
        {"restart_marker_blocks": 3},
        {"optimize": True},
        {"exif": b"Exif\0\0nonsense", "icc_profile": b"profile", "comment": b"seen"},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_else_encoders_write(options: dict[str, Any]) -> None:
    data = jpeg(**options)
    np.testing.assert_array_equal(jpeg_pixels(data, opened(data)), np.asarray(opened(data)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}])
def test_plain_files_need_no_pillow(mode: str, options: dict[str, Any]) -> None:
    data = jpeg(mode, **options)
    np.testing.assert_array_equal(plain_pixels(data, 67 * 45), jpeg_pixels(data, opened(data)))


@pytest.mark.parametrize(
    "data",
    [
        jpeg(exif=b"Exif\0\0nonsense"),
        jpeg(icc_profile=b"profile"),
        jpeg(comment=b"seen"),
        jpeg("CMYK"),
        jpeg(width=68),
        jpeg()[:-1],
        jpeg()[:300] + jpeg()[-2:],
        jpeg()[:20],
        b"\xff\xd8\xff",
    ],
    ids=["exif", "profile", "comment", "four colours", "too many pixels", "cut", "no scan", "head", "magic"],
)
def test_where_there_is_more_to_know_pillow_is_asked(data: bytes) -> None:
    assert plain_pixels(data, 67 * 45) is None


def test_four_colours_and_drafts_are_left_to_pillow() -> None:
    inks = jpeg("CMYK")
    assert jpeg_pixels(inks, opened(inks)) is None
    drafted = opened(jpeg(width=640, height=480))
    drafted.draft(None, (100, 100))
    assert jpeg_pixels(jpeg(width=640, height=480), drafted) is None


def outcome(data: bytes) -> DecodedImage | tuple[str, str]:
    try:
        return decode_image(data)
    except ImageError as error:
        return error.code, str(error)


DAMAGED = [jpeg(quality=60), jpeg(progressive=True), jpeg("L"), jpeg(restart_marker_blocks=2)]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_has_the_outcome_that_it_has_with_pillow(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(DAMAGED)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 3))] = data.draw(st.integers(0, 255))
    ours = outcome(bytes(damaged))
    with pytest.MonkeyPatch.context() as patch:
        for past_pillow in ("plain_pixels", "jpeg_pixels"):
            patch.setattr(smolvlm.image, past_pillow, lambda *_: None)
        theirs = outcome(bytes(damaged))
    if isinstance(ours, DecodedImage) and isinstance(theirs, DecodedImage):
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    else:
        assert ours == theirs
