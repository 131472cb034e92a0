"""The `fast` policy: the grids of the exact one, pixels close to it, and JPEGs reduced no further than they may be."""

import io
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm.config import ImageConfig
from smolvlm.image import (
    DecodedImage,
    ImageError,
    ImageLimits,
    ImagePolicy,
    Tiles,
    decode_image,
    split_decoded,
    split_image,
)
from smolvlm.jpeg import SLACK

CONFIG = ImageConfig(64, 256, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAST = ImagePolicy(fast=True)
POLICIES = (
    FAST,
    replace(FAST, image_splitting=False),
    replace(FAST, upscale=False),
    replace(FAST, longest_edge=100),
    replace(FAST, max_tiles=5),
)


def photograph(width: int, height: int) -> Image.Image:
    """Soft shapes, none of them alike, under sensor noise."""
    rng = np.random.default_rng(width * 7919 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    target = io.BytesIO()
    image.save(target, "JPEG", quality=92, exif=exif)
    return target.getvalue()


def decoded(data: bytes, policy: ImagePolicy) -> DecodedImage:
    return decode_image(data, needed=policy.needed(CONFIG))


def both(data: bytes, policy: ImagePolicy) -> tuple[Tiles, Tiles]:
    exact = replace(policy, fast=False)
    return split_decoded(decoded(data, policy), CONFIG, policy), split_decoded(decoded(data, exact), CONFIG, exact)


def difference(fast: Tiles, exact: Tiles) -> npt.NDArray[np.int64]:
    signed: npt.NDArray[np.int64] = fast.pixels.astype(np.int64) - exact.pixels
    return np.abs(signed)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from(POLICIES), st.sampled_from(range(1, 9)))
def test_grids_and_sizes_are_those_of_the_exact_policy(
    width: int, height: int, policy: ImagePolicy, orientation: int
) -> None:
    data = jpeg(Image.new("RGB", (width, height), (9, 99, 199)), orientation)
    fast, exact = both(data, policy)
    assert (fast.rows, fast.cols, fast.pixels.shape) == (exact.rows, exact.cols, exact.pixels.shape)
    assert difference(fast, exact).max() <= 1
    small, full = decoded(data, policy), decoded(data, ImagePolicy())
    assert (small.width, small.height, small.format) == (full.width, full.height, full.format)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1200), st.integers(1, 1200), st.sampled_from(POLICIES))
def test_no_jpeg_is_reduced_below_what_is_needed(width: int, height: int, policy: ImagePolicy) -> None:
    found = decoded(jpeg(Image.new("RGB", (width, height))), policy)
    needed = policy.needed(CONFIG)
    assert needed is not None
    for side, kept, least in zip((width, height), found.image.size, needed(width, height), strict=True):
        assert kept >= min(side, int(least * SLACK))


@pytest.mark.parametrize(
    ("size", "policy", "reduced"),
    [
        ((1000, 750), FAST, (250, 188)),
        ((900, 750), FAST, (450, 375)),
        ((480, 360), FAST, (240, 180)),  # a sixteenth below the 256 of the longest edge is enough
        ((479, 360), FAST, (479, 360)),
        ((1001, 751), FAST, (251, 188)),
        ((1000, 750), replace(FAST, image_splitting=False), (125, 94)),
        ((300, 200), FAST, (300, 200)),
    ],
)
def test_a_photograph_is_reduced_and_stays_close(
    size: tuple[int, int], policy: ImagePolicy, reduced: tuple[int, int]
) -> None:
    data = jpeg(photograph(*size))
    assert decoded(data, policy).image.size == reduced
    apart = difference(*both(data, policy))
    assert apart.mean() < 1.5
    assert np.percentile(apart, 99) <= 6
    assert apart.max() <= 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("policy", POLICIES[:2])
def test_every_orientation_is_applied_to_the_reduced_picture(orientation: int, policy: ImagePolicy) -> None:
    ramp = np.stack(np.broadcast_arrays(np.arange(1041)[None] / 5, np.arange(857)[:, None] / 4, 40), axis=-1)
    data = jpeg(Image.fromarray(ramp.astype(np.uint8)), orientation)
    found = decoded(data, policy)
    assert (found.width, found.height) == ((857, 1041) if orientation > 4 else (1041, 857))
    assert found.image.width < 600
    assert difference(*both(data, policy)).mean() < 0.35


def test_sharp_edges_stay_where_they_are() -> None:
    """A reduced picture has whole pixels; taken for all of it, they would move an edge by up to half of one."""
    page = np.full((857, 1041, 3), 250, np.uint8)
    page[:, 700:] = 10
    for orientation in range(1, 9):
        fast, exact = both(jpeg(Image.fromarray(page), orientation), replace(FAST, image_splitting=False))
        assert difference(fast, exact).max() <= 16, orientation


def test_only_a_fast_policy_reduces() -> None:
    data = jpeg(photograph(1000, 750))
    assert ImagePolicy().needed(CONFIG) is None
    found = decoded(data, ImagePolicy())
    assert found.box == (0.0, 0.0, 1000.0, 750.0)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(Image.open(io.BytesIO(data))))
    exact = split_image(found.image, CONFIG)
    np.testing.assert_array_equal(split_decoded(found, CONFIG).pixels, exact.pixels)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_every_colour_space_of_jpegs_can_be_reduced(mode: str) -> None:
    data = jpeg(photograph(1000, 750).convert(mode))
    assert decoded(data, FAST).image.size == (250, 188)
    assert difference(*both(data, FAST)).mean() < 2


def test_other_formats_are_resized_once() -> None:
    target = io.BytesIO()
    photograph(1000, 700).save(target, "PNG")
    assert decoded(target.getvalue(), FAST).image.size == (1000, 700)
    apart = difference(*both(target.getvalue(), FAST))
    assert 0 < apart.max() <= 8


def code_of(data: bytes, policy: ImagePolicy, limits: ImageLimits | None = None) -> str | None:
    try:
        decode_image(data, limits or ImageLimits(), policy.needed(CONFIG))
    except ImageError as error:
        return error.code
    return None


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_is_the_same_error(progressive: bool) -> None:
    target = io.BytesIO()
    photograph(600, 500).save(target, "JPEG", progressive=progressive)
    data, rng = target.getvalue(), np.random.default_rng(0)
    broken = [data[:length] for length in rng.integers(1, len(data), 60)]
    for start in rng.integers(2, len(data), 120):
        broken.append(data[:start] + rng.bytes(4) + data[start + 4 :])
    codes = [code_of(file, ImagePolicy()) for file in broken]
    assert [code_of(file, FAST) for file in broken] == codes
    assert set(codes[:60]) == {"truncated"}
    assert "decode_failed" in codes


def test_limits_are_those_of_the_header() -> None:
    data = jpeg(photograph(1000, 750))
    assert code_of(data, FAST, ImageLimits(max_pixels=750_000)) is None
    assert code_of(data, FAST, ImageLimits(max_pixels=749_999)) == "too_many_pixels"
    assert code_of(data, FAST, ImageLimits(max_bytes=len(data) - 1)) == "too_many_bytes"
