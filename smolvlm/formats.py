"""Which image format some bytes are, and whether the file is all there: both from the bytes alone.

Pillow reports a file cut short as anything from UnidentifiedImageError to a silently grey image, and it accepts many
files whose end is missing. The containers themselves say where they end, so they are walked here; no pixel is decoded.
"""

import struct
from collections.abc import Callable

ALLOWED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")

PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}
TIFF_DATA = ((273, 279), (324, 325))  # offsets and byte counts of strips, and of tiles
MAX_STEPS = 500_000  # a hostile file of tiny blocks must not keep the walk busy; what it cannot tell, Pillow decides
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)

# Formats that buckets hold and this package refuses by name. (offset, bytes) → name
KNOWN = {
    (0, b"8BPS"): "PSD",
    (0, b"%PDF"): "PDF",
    (0, b"%!PS"): "EPS",
    (0, b"\0\0\1\0"): "ICO",
    (0, b"\0\0\2\0"): "CUR",
    (0, b"icns"): "ICNS",
    (0, b"\xff\x0a"): "JXL",
    (0, b"\0\0\0\x0cJXL \r\n\x87\n"): "JXL",
    (0, b"\0\0\0\x0cjP  \r\n\x87\n"): "JPEG 2000",
    (0, b"\xff\x4f\xff\x51"): "JPEG 2000",
    (0, b"II\xbc"): "JPEG XR",
    (0, b"v/1\1"): "OpenEXR",
    (0, b"#?RADIANCE"): "HDR",
    (0, b"DDS "): "DDS",
    (0, b"qoif"): "QOI",
    (0, b"gimp xcf"): "XCF",
    (0, b"AT&TFORM"): "DjVu",
    (0, b"\xd7\xcd\xc6\x9a"): "WMF",
    (40, b" EMF"): "EMF",
    (0, b"BPG\xfb"): "BPG",
    (0, b"FLIF"): "FLIF",
    (0, b"SIMPLE  ="): "FITS",
    (0, b"FUJIFILMCCD-RAW"): "RAF",
    (128, b"DICM"): "DICOM",
}
HEIF_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    b"crx ": "CR3",
}


def sniff(data: bytes) -> str | None:
    """Name the format by its magic bytes, or None. A file cut inside the magic of an accepted format still has it."""
    accepted = _sniff_accepted(data)
    if accepted is not None:
        return accepted
    for (offset, magic), name in KNOWN.items():
        if data.startswith(magic, offset):
            return name
    if data[4:8] == b"ftyp":
        return HEIF_BRANDS.get(data[8:12])
    return _sniff_text(data[:1024])


def is_truncated(data: bytes, kind: str) -> bool:
    """True where the file ends before its own structure says so; of a TIFF, before its first page does.

    `kind` is one of ALLOWED. A file damaged so that its structure cannot be followed is not called truncated.
    """
    try:
        return _COMPLETE[kind](data) is False
    except (struct.error, IndexError):  # a field of the structure itself lies beyond the end
        return True


def _sniff_accepted(data: bytes) -> str | None:
    if _starts(data, PNG):
        return "PNG"
    if _starts(data, b"\xff\xd8\xff"):
        return "JPEG"
    if _starts(data, b"GIF87a") or _starts(data, b"GIF89a"):
        return "GIF"
    if _starts(data[:4], b"RIFF") and _starts(data[8:], b"WEBP"):
        return "WEBP"
    if any(_starts(data, magic) for magic in TIFF):
        return "TIFF"
    return "BMP" if _looks_like_bmp(data) else None


def _starts(data: bytes, magic: bytes) -> bool:
    return data[: len(magic)] == magic[: len(data)]


def _looks_like_bmp(data: bytes) -> bool:
    """`BM` begins words too: the size of the second header must fit; in a shorter file, the reserved bytes are zero."""
    if not _starts(data, b"BM"):
        return False
    header = data[14:18]
    return int.from_bytes(header, "little") in BMP_HEADERS if len(header) == 4 else not data[6:10].strip(b"\0")


def _sniff_text(head: bytes) -> str | None:
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace():
        return "PNM"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!doctype", b"<!--")) and b"<svg" in text):
        return "SVG"
    return None


def _jpeg(data: bytes) -> bool | None:
    """Markers up to the first scan, then an end marker anywhere behind it: a scan never holds FF D9."""
    position = 2
    for _ in range(MAX_STEPS):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0xD9:
            return None
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
        else:
            position += 2 + int(struct.unpack_from(">H", data, position + 2)[0])
            if marker == 0xDA:
                return data.rfind(b"\xff\xd9", position) >= 0  # where most files have it
    return None


def _png(data: bytes) -> bool | None:
    position = len(PNG)
    for _ in range(MAX_STEPS):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if position > len(data):
            return False
        if kind == b"IEND":
            return True
    return None


def _gif(data: bytes) -> bool | None:
    """Blocks of all frames up to the trailer."""
    position, inside = 13 + _gif_palette(data[10]), False
    for _ in range(MAX_STEPS):
        block = data[position]
        if inside:  # sub-blocks: a length and its bytes, until a length of 0
            position, inside = position + 1 + block, block > 0
        elif block == 0x3B:
            return True
        elif block == 0x21:  # extension
            position, inside = position + 2, True
        elif block == 0x2C:  # frame
            position, inside = position + 11 + _gif_palette(data[position + 9]), True
        else:
            position += 1  # readers skip stray bytes
    return None


def _gif_palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(data: bytes) -> bool | None:
    return 8 + int(struct.unpack_from("<I", data, 4)[0]) <= len(data)


def _bmp(data: bytes) -> bool | None:
    """The pixel array's offset and size; compressed bitmaps state the size, plain ones imply it."""
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return bool(start + _bmp_rows(width, height, bits) <= len(data))
    width, height, _, bits, compression, size = struct.unpack_from("<iiHHII", data, 18)
    plain = compression in (0, 3, 6)
    needed = _bmp_rows(abs(width), abs(height), bits) if plain else size
    return bool(start + needed <= len(data))


def _bmp_rows(width: int, height: int, bits: int) -> int:
    return (width * bits + 31) // 32 * 4 * height


def _tiff(data: bytes) -> bool | None:
    """The first directory, the values it points to, and the strips or tiles that these locate."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    directory = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, directory)[0]
    first, size = directory + (8 if big else 2), (20 if big else 12)
    if first + count * size > len(data):
        return False
    if count > MAX_STEPS:
        return None
    entries = [_tiff_entry(data, first + index * size, order, big) for index in range(count)]
    if any(end > len(data) for _, end, _ in entries):
        return False
    values = {tag: numbers for tag, _, numbers in entries}
    spans = [pair for at, sizes in TIFF_DATA for pair in zip(values.get(at, ()), values.get(sizes, ()), strict=False)]
    return all(offset + length <= len(data) for offset, length in spans)


def _tiff_entry(data: bytes, position: int, order: str, big: bool) -> tuple[int, int, tuple[int, ...]]:
    """Gives the tag, where its value ends, and its values where they are unsigned integers within the file."""
    tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, position)
    inline = position + (12 if big else 8)
    length = TIFF_SIZES.get(kind, 0) * count
    start = inline
    if length > (8 if big else 4):
        start = struct.unpack_from(order + ("Q" if big else "I"), data, inline)[0]
    located = any(tag in pair for pair in TIFF_DATA) and kind in TIFF_INTEGERS and start + length <= len(data)
    values = struct.unpack_from(f"{order}{count}{TIFF_INTEGERS[kind]}", data, start) if located else ()
    return tag, start + length, values


_COMPLETE: dict[str, Callable[[bytes], bool | None]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
