"""The demo's input, drawn on the spot: receipts, notes, signs and tables, each with what is written on it, and one
broken file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_ORIENTATION_TAG, _ROTATED_90 = 0x0112, 6
BROKEN, SIDEWAYS = "broken.jpg", "receipt-books.jpg"


@dataclass(frozen=True)
class DemoImage:
    """An image file and the text on it, a line for every visual line."""

    data: bytes
    text: str


Drawn = tuple[Image.Image, str]


def demo_images() -> dict[str, DemoImage]:
    """Return file name → image: eleven good ones, one of them stored on its side, and `broken.jpg`, cut in half."""
    drawn = {
        "receipt-cafe.png": _receipt("CAFE ORION", [("Espresso", 2.40), ("Croissant", 3.10), ("Orange juice", 4.20)]),
        SIDEWAYS: _receipt("PAGE & SON", [("Atlas", 39.00), ("Notebook", 5.50), ("Pencil", 0.90)]),
        "receipt-tools.webp": _receipt("IRON WORKS", [("Hammer", 18.75), ("Nails 200", 6.20)]),
        "receipt-market.png": _receipt("FRESH MARKET", [("Apples 1 kg", 3.49), ("Bread", 2.20), ("Milk", 1.15)]),
        "note-meeting.png": _note("Meeting moved", ["Room 214, not 118.", "Tuesday, 9:30.", "Bring the figures."]),
        "note-shopping.jpg": _note("Shopping", ["6 eggs", "flour, 1 kg", "two lemons", "butter"]),
        "letter.png": _note(
            "Dear Ms. Abara,", ["thank you for your order 4471.", "It leaves on 3 March.", "Yours, R. Lind"]
        ),
        "sign-exit.png": _sign("EXIT", (20, 120, 60)),
        "sign-stop.jpg": _sign("STOP", (190, 30, 40)),
        "sign-trail.webp": _sign("TRAIL 7 km", (110, 80, 40)),
        "table-trains.png": _table([["Train", "From", "At"], ["IC 61", "Basel", "08:12"], ["RE 5", "Bern", "08:40"]]),
    }
    images = {name: DemoImage(_encode(image, name), text) for name, (image, text) in drawn.items()}
    whole = images["sign-stop.jpg"].data
    return {**images, BROKEN: DemoImage(whole[: len(whole) // 2], "")}


def _encode(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if name == SIDEWAYS:
        # As cameras store it; the tag says how to turn it back.
        image, exif[_ORIENTATION_TAG] = image.transpose(Image.Transpose.ROTATE_90), _ROTATED_90
    image.save(buffer, _FORMATS[name.rpartition(".")[2]], exif=exif)
    return buffer.getvalue()


def _paper(width: int, height: int, color: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _receipt(shop: str, items: Sequence[tuple[str, float]]) -> Drawn:
    image, draw = _paper(300, 170 + 32 * len(items))
    draw.text((150, 30), shop, "black", _font(26), anchor="mm")
    lines = [*items, ("TOTAL", sum(price for _, price in items))]
    for index, (name, price) in enumerate(lines):
        y = 70 + 32 * index + (16 if name == "TOTAL" else 0)
        draw.text((24, y), name, "black", _font(20))
        draw.text((276, y), f"{price:.2f}", "black", _font(20), anchor="ra")
    draw.line((24, 76 + 32 * len(items), 276, 76 + 32 * len(items)), "black", 2)
    return image, "\n".join([shop, *(f"{name} {price:.2f}" for name, price in lines)])


def _note(title: str, lines: Sequence[str]) -> Drawn:
    image, draw = _paper(420, 90 + 44 * len(lines), "#fff6c9")
    draw.text((24, 20), title, "#20304a", _font(30))
    for index, line in enumerate(lines):
        draw.text((24, 76 + 44 * index), line, "#20304a", _font(24))
    return image, "\n".join([title, *lines])


def _sign(text: str, color: tuple[int, int, int]) -> Drawn:
    image, draw = _paper(440, 260, "#9db4c8")
    draw.rounded_rectangle((40, 50, 400, 210), 24, fill=color, outline="white", width=6)
    draw.text((220, 130), text, "white", _font(60), anchor="mm")
    return image, text


def _table(rows: Sequence[Sequence[str]]) -> Drawn:
    image, draw = _paper(400, 30 + 48 * len(rows))
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            draw.rectangle((20 + 120 * x, 15 + 48 * y, 140 + 120 * x, 63 + 48 * y), outline="gray")
            draw.text((32 + 120 * x, 26 + 48 * y), cell, "black", _font(22))
    return image, "\n".join(" ".join(row) for row in rows)
