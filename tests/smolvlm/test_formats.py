"""Formats by their magic bytes, and files cut or damaged anywhere: always an image or a typed error."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm.formats import ALLOWED, is_truncated, sniff
from smolvlm.image import ImageError, decode_image


def encoded(mode: str, format: str, **options: Any) -> bytes:  # noqa: A002 (Pillow's name)
    pixels = np.random.default_rng(1).integers(0, 256, (17, 24, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if "append_images" in options:
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds another JPEG, with an end marker of its own."""
    exif = b"Exif\0\0" + encoded("L", "JPEG")
    return encoded("RGB", "JPEG", exif=exif)


FILES = {
    "jpeg": encoded("RGB", "JPEG"),
    "jpeg progressive": encoded("RGB", "JPEG", progressive=True),
    "jpeg grey": encoded("L", "JPEG"),
    "jpeg cmyk": encoded("CMYK", "JPEG"),
    "jpeg thumbnail": with_thumbnail(),
    "png": encoded("RGB", "PNG"),
    "png palette": encoded("P", "PNG"),
    "png alpha": encoded("RGBA", "PNG"),
    "png bilevel": encoded("1", "PNG"),
    "png animated": encoded("RGB", "PNG", append_images=[]),
    "gif": encoded("RGB", "GIF"),
    "gif animated": encoded("RGB", "GIF", append_images=[]),
    "webp": encoded("RGB", "WEBP"),
    "webp lossless": encoded("RGB", "WEBP", lossless=True),
    "webp alpha": encoded("RGBA", "WEBP"),
    "webp animated": encoded("RGB", "WEBP", append_images=[]),
    "tiff": encoded("RGB", "TIFF"),
    "tiff lzw": encoded("RGB", "TIFF", compression="tiff_lzw"),
    "tiff deflate": encoded("RGB", "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encoded("RGB", "TIFF", compression="jpeg"),
    "tiff packbits": encoded("RGB", "TIFF", compression="packbits"),
    "tiff big": encoded("RGB", "TIFF", big_tiff=True),
    "bmp": encoded("RGB", "BMP"),
    "bmp palette": encoded("P", "BMP"),
    "bmp bilevel": encoded("1", "BMP"),
    "bmp alpha": encoded("RGBA", "BMP"),
}


def code_of(data: bytes) -> str | None:
    """None where it decodes; any other exception than ImageError fails the test."""
    try:
        decode_image(data)
    except ImageError as error:
        return error.code
    return None


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_whole(name: str) -> None:
    assert sniff(FILES[name]) in ALLOWED
    assert code_of(FILES[name]) is None


@pytest.mark.parametrize("name", FILES)
def test_a_cut_at_any_byte_is_found(name: str) -> None:
    data = FILES[name]
    codes = {code_of(data[:length]) for length in range(1, len(data))}
    assert codes == {"truncated"}


def test_a_cut_of_a_large_file_is_found() -> None:
    image = Image.effect_noise((700, 500), 90).convert("RGB")
    for format in ALLOWED:  # noqa: A001
        buffer = io.BytesIO()
        image.save(buffer, format)
        data = buffer.getvalue()
        cuts = [len(data) * step // 23 for step in range(1, 23)] + [len(data) - 1]
        assert {code_of(data[:length]) for length in cuts} == {"truncated"}, format


def test_later_pages_of_a_tiff_and_bytes_behind_the_end_do_not_matter() -> None:
    pages = encoded("RGB", "TIFF", append_images=[])
    assert code_of(pages[:-1]) is None
    for name in ("jpeg", "png", "gif", "webp", "bmp", "tiff"):
        assert code_of(FILES[name] + b"trailing bytes") is None, name


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_anywhere_gives_an_image_or_a_code(data: st.DataObject) -> None:
    # libtiff reports damaged strips on stderr, past Python; one uncompressed TIFF is enough here
    names = [name for name in FILES if not name.startswith("tiff ")]
    damaged = bytearray(FILES[data.draw(st.sampled_from(names))])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    expected = {None, "decode_failed", "truncated", "not_an_image", "too_many_pixels", "unsupported_format"}
    assert code_of(bytes(damaged)) in expected


@settings(max_examples=300, deadline=None)
@given(head=st.sampled_from(sorted({data[:16] for data in FILES.values()})), rest=st.binary(max_size=200))
def test_any_bytes_behind_a_magic_give_a_code(head: bytes, rest: bytes) -> None:
    code_of(head + rest)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=64))
def test_any_bytes_give_a_code(data: bytes) -> None:
    assert isinstance(code_of(data), str)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\xff\x0a\xfa\x1f", "JXL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe", "EPS"),
        (b"P6\n3 3\n255\n", "PNM"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a --><svg>', "SVG"),
        (b"II\xbc\1\x08\0\0\0", "JPEG XR"),
        (b"v/1\1\2\0\0\0", "OpenEXR"),
        (b"DDS |\0\0\0", "DDS"),
        (b"qoif\0\0", "QOI"),
    ],
)
def test_known_formats_are_refused_by_name(head: bytes, name: str) -> None:
    assert sniff(head) == name
    with pytest.raises(ImageError, match=name) as caught:
        decode_image(head)
    assert caught.value.code == "unsupported_format"


@pytest.mark.parametrize("format", ["ICO", "JPEG2000", "PPM", "DDS", "PDF", "EPS", "ICNS", "QOI", "AVIF"])
def test_what_pillow_could_open_is_refused_all_the_same(format: str) -> None:  # noqa: A002
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, format)
    assert code_of(buffer.getvalue()) == "unsupported_format"


@pytest.mark.parametrize(
    "data",
    [
        b"BMW makes cars, and this is not a picture of one",
        b"MM is the year 2000, and II the second",
        b"GIF files are images; this is text",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\0\0\0\x20ftypisom\0\0\2\0",
        b"PK\3\4\x14\0\0\0",
        b"<html><body>404</body></html>",
        b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        b"P is for potato",
        b"\x1f\x8b\x08\0",
        b"{}",
    ],
)
def test_other_files_are_not_images(data: bytes) -> None:
    assert sniff(data) is None
    assert code_of(data) == "not_an_image"


def test_hostile_structures_end_quickly() -> None:
    chunk = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    assert not is_truncated(FILES["png"][:33] + chunk * 600_000, "PNG")
    assert not is_truncated(FILES["gif"][:13] + b"\x21\xfe\1a\0" * 600_000, "GIF")
    assert not is_truncated(b"\xff\xd8" + b"\xff\xe0\0\2" * 600_000, "JPEG")
